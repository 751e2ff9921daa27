"""Device functions that kernels of several packages are made of. Importing this imports triton."""
