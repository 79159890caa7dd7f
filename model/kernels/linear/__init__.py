"""`x` times a weight, transposed: one function, spelled for the shape, the dtype and the device."""

from model.kernels.linear.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from model.kernels.linear.api import grouped_linear as grouped_linear
from model.kernels.linear.api import linear as linear
