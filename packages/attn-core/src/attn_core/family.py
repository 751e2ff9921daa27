"""The packages of the family, known by name alone."""

MODULES = (
    "attn_core",
    "attn_flash",
    "attn_paged",
    "attn_triangle",
    "attn_evo",
    "attn_vulkan",
)
