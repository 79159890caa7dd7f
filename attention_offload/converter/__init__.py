"""Cuts any JAX decoding step into dense slices and attention slices (Lamina, section 4.2; floor 3)."""

from attention_offload.converter.convert import convert as convert
from attention_offload.converter.errors import ConversionError as ConversionError
from attention_offload.converter.roles import Role as Role
from attention_offload.converter.roles import Side as Side
from attention_offload.converter.split_step import SplitStep as SplitStep
