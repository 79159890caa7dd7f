"""C++ beside the code: built at first use, kept in a cache, registered with XLA."""

from native.library import NativeLibrary as NativeLibrary
from native.library import UnavailableError as UnavailableError
