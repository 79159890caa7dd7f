"""Binary sequences (codes of +1 and -1): correlation, verifiers, symmetry, constructions, exact enumeration."""
