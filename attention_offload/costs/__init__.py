"""What a decode step costs on a given set of devices: operators, knobs, capacity, deployments."""
