"""Samples images and draws them: `sampling` has the one loop from noise to images, `pictures` grids and PNG files.

Import the modules themselves: this package imports neither torch, diffusers nor Pillow.
"""
