"""HpGAN: a Hopfield-encoder GAN that searches for code sequences. Stands alone."""
