"""Every field of an experiment, once. The defaults are the paper's (ResNet-50, ViT-B/16)."""

from ml_collections import ConfigDict

from zegformer_jax.models.backbones import BACKBONES, backbone_fields, backbone_variants
from zegformer_jax.runtime.errors import UserError


def get_config() -> ConfigDict:
    """Returns the complete configuration, which the experiments change."""
    config = ConfigDict()
    config.seed = 0  # random seed of parameters, dropout, image order and augmentation
    config.dtype = "float32"  # training computes in it: float32 or bfloat16; parameters are float32

    config.model = ConfigDict()
    config.model.kind = "zegformer"  # zegformer, per_pixel, classifier or clip
    # Name and attributes of the backbone, see its module in zegformer_jax/models/backbones.
    config.model.backbone = backbone_fields("resnet")
    config.model.pixel_decoder = ConfigDict()
    config.model.pixel_decoder.width = 256  # channels of the feature pyramid
    config.model.pixel_decoder.mask_width = 256  # channels of the mask features
    config.model.pixel_decoder.norm_groups = 32  # groups of its group norms
    config.model.pixel_decoder.encoder_layers = 0  # transformer layers between res5 and the pyramid
    config.model.pixel_decoder.encoder_heads = 8  # attention heads of these layers
    config.model.pixel_decoder.encoder_mlp_width = 2048  # hidden channels of these layers' MLPs
    config.model.pixel_decoder.dropout = 0.1  # dropout of these layers
    config.model.memory = "res5"  # feature map that the transformer attends to, res2 to res5
    config.model.transformer = ConfigDict()
    config.model.transformer.queries = 100  # segments per image
    config.model.transformer.width = 256  # channels of a query
    config.model.transformer.layers = 6  # decoder layers, each with its own loss
    config.model.transformer.heads = 8  # attention heads
    config.model.transformer.mlp_width = 2048  # hidden channels of the MLPs
    config.model.transformer.dropout = 0.1  # dropout of attention weights and residual branches
    config.model.transformer.project_input = True  # puts a 1x1 convolution on model.memory
    # Weights to start from: another run's workdir (relative to this one), or a pretrained backbone
    # or a checkpoint: a file, https://..., detectron2://... or a name on the Hub (docs/weights.md).
    # A config's variant names its backbone's; "": from scratch.
    config.model.start_from = ""

    # Word vectors of the per-pixel baseline (.npz: names, vectors); "": CLIP's text embeddings.
    config.model.word_vectors = ""

    config.clip = ConfigDict()
    # A CLIP: a name on the Hub, or a folder or file relative to the workdir or the current folder.
    config.clip.source = "openai/clip-vit-base-patch16"
    # Side of CLIP's input in pixels; its position embeddings are interpolated. 0: as trained.
    config.clip.input_size = 0
    # Prompt sets: a name in data/prompts.json, or FILE.json:NAME for a set in a file of that form,
    # relative to the workdir or the current folder.
    config.clip.grouper_prompts = "imagenet_select"  # prompt set of the grouper's class logits
    config.clip.classifier_prompts = "imagenet_select_clip"  # the classifier's prompt set
    # Sizes of a CLIP that is trained here (model.kind clip); not read otherwise.
    config.clip.image_size = 48  # side of its images in pixels
    config.clip.patch_size = 8  # side of a patch in pixels
    config.clip.vision_width = 128  # channels of the image tower
    config.clip.vision_layers = 4  # blocks of the image tower
    config.clip.vision_heads = 4  # attention heads of the image tower
    config.clip.text_width = 128  # channels of the text tower
    config.clip.text_layers = 2  # blocks of the text tower
    config.clip.text_heads = 4  # attention heads of the text tower
    config.clip.vocab_size = 2048  # most tokens of the vocabulary
    config.clip.context_length = 32  # most tokens of a caption
    config.clip.embed_dim = 128  # size of the joint embedding
    config.clip.initial_logit_scale = 1 / 0.07  # first factor on cosines; CLIP, section 2.5

    config.dataset = ConfigDict()
    config.dataset.name = "openmoji_voc"  # docs/datasets.md lists the names
    # Prepared records, or a folder of your own: relative to the workdir or the current folder, or
    # gs://...
    config.dataset.directory = "records"
    # Classes of the labels: a name in data/vocabularies or a file; "": classes.json of the
    # directory.
    config.dataset.vocabulary = "openmoji_voc"
    config.dataset.all_seen = False  # trains on the labels of all classes, as supervised models do
    # Of the generated data set openmoji_voc: train_scenes, validation_scenes, side (pixels), seed.
    config.dataset.options = ConfigDict()

    config.input = ConfigDict()
    config.input.batch_size = 32  # images per step, over all devices
    config.input.crop_size = 512  # side of a training crop in pixels
    # The shorter side of a training image is resized to one of these, drawn at random, in pixels.
    config.input.short_sides = tuple(int(512 * s / 10 + 0.5) for s in range(5, 21))
    config.input.max_long_side = 2048  # longest side of a resized training image in pixels
    # Leaves images without a seen class out of the training; the published system does not.
    config.input.skip_unseen_pictures = False
    # Trains on a folder of your own though a seen class has no pixel, or no pixel has a label.
    config.input.allow_missing_classes = False
    config.input.threads = 0  # threads that read and augment images; 0: one per core
    config.input.prefetch = 2  # batches made ahead of the step; bounds the host's memory

    config.loss = ConfigDict()
    config.loss.class_weight = 1.0  # weight of the cross entropy
    config.loss.mask_weight = 20.0  # weight of the focal loss
    config.loss.dice_weight = 1.0  # weight of the dice loss
    config.loss.no_object_weight = 0.1  # weight of "no object" queries in the cross entropy
    config.loss.max_targets = 0  # most segments of an image, others are left out; 0: the queries

    config.optimiser = ConfigDict()
    config.optimiser.learning_rate = 1e-4  # largest learning rate
    config.optimiser.weight_decay = 1e-4  # decoupled weight decay
    config.optimiser.clip_norm = 0.01  # largest global norm of the gradient; 0: no clipping
    config.optimiser.power = 0.9  # power of the polynomial decay to 0
    config.optimiser.warmup_steps = 0  # steps of a linear rise before it
    # Parameters (regular expression of the whole path) and factors on their settings above.
    config.optimiser.groups = (
        ("backbone/.*", {"learning_rate": 0.1}),
        (".*norm.*", {"weight_decay": 0.0}),
        ("transformer/query_embedding", {"weight_decay": 0.0}),
    )

    config.train = ConfigDict()
    config.train.steps = 10_000  # steps of the whole training
    config.train.log_every = 50  # steps between lines of metrics
    config.train.checkpoint_every = 1000  # steps between checkpoints
    config.train.keep_checkpoints = 2  # number of newest checkpoints kept, and the best one
    config.train.validate_every = 0  # steps between validations, and one after the last; 0: none
    config.train.accumulate = 1  # parts of a batch, one after the other: less memory, same result
    config.train.remat = False  # recomputes the backbone for the gradient: less memory, more time
    config.train.ema = 0.0  # decay of the averages of parameters, such as 0.999; 0: no averages
    config.train.most_skipped = 5  # steps in a row with infinite or NaN gradients that stop the run
    config.train.tensorboard = True  # writes TensorBoard's events beside metrics.jsonl

    config.sharding = ConfigDict()
    # Axis over which parameters and optimiser state are split: data (FSDP), model (the devices that
    # share a batch's rows) or "" (replicated).
    config.sharding.params = ""
    config.sharding.model = 1  # devices that share a batch's rows

    config.eval = ConfigDict()
    # Names in data/vocabularies to report, the first as the headline; their classes are in the data
    # set's vocabulary. (): the data set's vocabulary.
    config.eval.vocabularies = ()
    config.eval.checkpoint = "latest"  # latest, or best by the harmonic mIoU of its validation
    config.eval.dtype = "float32"  # evaluation and prediction compute in it: float32 or bfloat16
    config.eval.batch_size = 8  # images per step and host, over its devices; changes only rounding
    config.eval.short_side = 512  # the shorter side is resized to it, in pixels
    config.eval.max_long_side = 2048  # longest side of a resized image in pixels
    # Side in pixels of the overlapping tiles into which `predict` and the Python API cut a large
    # image; each is resized and segmented as an image of its own. 0: the whole image at once.
    config.eval.tile = 0
    # Test-time augmentation: further shorter sides, whose scores are averaged with the first's.
    # detectron2's are 400, 500, ..., 1200 and flip, with max_long_side 4000.
    config.eval.more_short_sides = ()
    config.eval.flip = False  # test-time augmentation: adds the mirrored image of each size
    config.eval.grouper_prompts = ""  # another clip.grouper_prompts for evaluation; "": the same
    config.eval.scores = "ensemble"  # method shown: grouper, clip, ensemble or ensemble_all
    config.eval.ensemble_weight = 2 / 3  # lambda: the grouper's weight on seen classes
    # crops (CLIP sees a crop of each segment, as published) or one_pass (CLIP sees the whole image
    # once, and a token per segment attends within its segment: much faster, another accuracy).
    config.eval.segment_classifier = "crops"
    config.eval.crop_style = "cropmask"  # content of a crop: cropmask, crop or mask
    config.eval.one_pass_layers = 4  # last layers of CLIP in which segments are apart
    config.eval.resize = "after"  # masks to the image's size: after the sum over queries or before
    config.eval.gamma = 0.1  # calibration: subtracted from the scores of seen classes
    config.eval.sweep_gamma = ""  # more gammas for eval.scores, first:last:step: 0:0.3:0.05
    config.eval.clip_chunk = 0  # segments that CLIP encodes at once; 0: 4 on a CPU, 25 elsewhere
    config.eval.methods = ()  # methods to report, see eval.scores; (): all
    config.eval.oracles = True  # also measures how segments fit, and segments and names apart
    # Segments whose weight is provably below this in every pixel are not shown to CLIP. 0: only
    # empty segments, as one; exact.
    config.eval.skip_below = 0.0
    config.eval.top_segments = 0  # CLIP names this many segments, the grouper the others; 0: all
    return config.lock()


def set_variant(config: ConfigDict, name: str, baseline_backbone: str) -> None:
    """Sets an unlocked config's backbone and its start, or makes it the baseline's config.

    Args:
        config: The config.
        name: A variant of a backbone, such as `r101`, or `per_pixel` for the baseline.
        baseline_backbone: The variant that is the baseline's backbone.

    Raises:
        UserError: The name is unknown.
    """
    if name == "per_pixel":
        config.model.kind, name = name, baseline_backbone
    variants = backbone_variants()
    if name not in variants:
        raise UserError(f"no variant '{name}': choose per_pixel or {', '.join(variants)}")
    config.model.backbone = backbone_fields(**variants[name])  # each backbone has its own fields
    backbone = BACKBONES[config.model.backbone.name]
    config.model.update(start_from=backbone.starts.get(name, ""))
    config.optimiser.groups += tuple(backbone.optimiser_groups)
