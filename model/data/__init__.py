"""Files on disk ↔ samples: readers of images and records, validation, data sets, sampling.

``records`` finds records in a file, ``schema`` makes a ``Sample`` of one, ``readers`` and ``dicom`` decode its pixels,
``validate`` reports everything wrong with a file at once, ``dataset`` feeds training, ``sampling`` sets the order.
"""
