"""The tables and figures of Lamina (arXiv:2405.01814), the paper's numbers beside ours."""
