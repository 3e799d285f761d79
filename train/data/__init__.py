"""Data pipelines of the training programs: packed text and augmented images, through grain.

`text.load_text` and `vision.load_vision` build everything that can fail (missing packages, files
that do not decode, datasets that were never prepared) before they return, so that a run stops
before anything is compiled. The iterators they hand out are `grain.DatasetIterator`s whose state is
a JSON-serialisable dict: `set_state(get_state())` continues with exactly the next batch.
"""
