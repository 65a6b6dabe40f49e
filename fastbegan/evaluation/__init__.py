"""How good images are: Frechet and kernel distances, inception score, precision and recall, nearest images."""
