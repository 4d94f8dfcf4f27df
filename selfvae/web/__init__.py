"""The page of `selfvae serve`: work.py does what its tabs do, page.py lays them out."""
