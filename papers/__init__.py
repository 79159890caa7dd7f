"""A paper's numbers beside ours: the rows that the tables of every system are made of."""
