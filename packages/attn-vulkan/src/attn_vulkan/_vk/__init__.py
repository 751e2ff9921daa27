"""Vulkan through ctypes: the loader, the C structures, an instance. Nothing else is needed."""
