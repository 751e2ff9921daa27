"""Other libraries' attention, computed here: one module for each library.

`sdpa` replaces ``torch.nn.functional.scaled_dot_product_attention``, `torch_flash` the kernels
below it, `transformers` and `diffusers` register a backend of their libraries, `comfyui` an
attention function. None imports its library before it is used, and each can be undone.
"""
