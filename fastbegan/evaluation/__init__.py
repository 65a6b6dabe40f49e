"""Quality of images: Frechet and kernel distance, inception score, precision and recall, nearest images."""
