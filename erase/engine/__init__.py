"""The engine: what every method and every model share. It knows no diffusion and no file format."""
