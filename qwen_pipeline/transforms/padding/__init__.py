"""Padding of MLPs to a width that tensor-parallel ranks can share, and its reverse."""
