"""An open device: its memory, pipelines and command buffers. `context.open_context` makes one."""
