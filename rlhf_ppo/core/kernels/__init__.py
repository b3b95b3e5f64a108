"""Kernels: the same numbers as the plain functions, without holding [N, V]."""
