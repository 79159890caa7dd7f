"""Runs cut steps: attention on the devices that own the KV, all else on the devices that own the weights."""
