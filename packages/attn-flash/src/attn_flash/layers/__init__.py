"""Layers beside attention, in the places where flash-attn has them."""
