"""DreamBooth on Stable Diffusion.

One alphabet of shapes for the whole repository, used in docstrings and einops patterns:

    B  items of a batch          H, W  pixels (height, width)
    C  channels                  h, w  latent cells (H = f * h)
    M  tokens of a prompt (77)   D     width of the text context
    T  diffusion timesteps (1000)

Pixels are RGB in [-1, 1]; latents are already multiplied by the autoencoder's `scale_factor`.
"""

__version__ = "0.1.0"
