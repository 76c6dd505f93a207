"""The parts of `dogs_and_cats.py` and `imdb_faces.py`: runs, their page and their tables."""
