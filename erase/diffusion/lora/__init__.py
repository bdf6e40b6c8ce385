"""LoRA files: a change of weights in low rank, under the names that diffusers, ComfyUI and the WebUIs read."""
