"""The machine: its devices, number formats, threads and signals."""
