"""Records: a data set's images and labels in ArrayRecord files, laid out as TFDS does.

A prepared directory is local or in a bucket (gs://...) and holds, for a data set "name":
  name-train.array_record-00000-of-00042, ...   records with the features image, label and id
  dataset_info.json, features.json              TFDS's metadata, for `tfds.builder_from_directory`
  train.index.json, ...                         ids of the records and classes in their labels
  classes.json                                  the vocabulary that the labels follow
  prepared.json                                 description of the records; written last
  sheet.png                                     twelve records with their labels

ArrayRecord has random access and a hash of every record. array_record 0.8.6 reads gs:// with its
own client: one request for a record, so a local copy is faster where the network is slow. Its
writer knows local files only; a bucket gets a copy of each finished shard. TFDS's own builders
write the same files, but start from the first record again after an interruption.
"""
