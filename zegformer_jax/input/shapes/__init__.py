"""Label files of shapes with names: COCO's JSON of a whole split, or labelme's JSON of an image.

`coco` and `labelme` read the files into `Annotation`, whose shapes all have COCO's form;
`masks` finds their pixels; `labels` matches their names with classes and draws the label map.
"""
