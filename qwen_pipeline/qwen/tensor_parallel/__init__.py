"""Rules of serving engines for tensor-parallel ranks, and the paddings that satisfy them."""
