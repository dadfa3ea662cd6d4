"""Files on disk ↔ samples: images, volumes and masks, records, validation, data sets, sampling.

``records`` finds records in a file, ``schema`` makes a ``Sample`` of one, ``image_io``, ``dicom`` and ``volumes``
decode its pixels, ``validate`` reports everything wrong with a file at once, ``dataset`` feeds training, ``sampling``
sets the order.
"""
