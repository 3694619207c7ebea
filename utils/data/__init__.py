"""Data sets, folders of images, augmentation, and trained networks with their test images."""
