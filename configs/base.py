"""Every field of an experiment, once. The defaults are the paper's (ResNet-50, ViT-B/16)."""

from ml_collections import ConfigDict

from zegformer_jax.models.backbones.resnet import BLOCKS
from zegformer_jax.models.backbones.swin import SWIN

# Sections of `model` and their fields by the names that stand after a config file's colon.
BACKBONES = {f"r{depth}": {"backbone": {"blocks": blocks}} for depth, blocks in BLOCKS.items()}
BACKBONES |= {f"swin_{size[0]}": {"swin": sizes._asdict()} for size, sizes in SWIN.items()}


def get_config() -> ConfigDict:
    """Gives the complete configuration that the experiments change."""
    config = ConfigDict()
    config.seed = 0  # of parameters, dropout, order and augmentation of the examples
    config.dtype = "float32"  # what training computes in, or bfloat16; parameters are float32

    config.model = ConfigDict()
    config.model.kind = "zegformer"  # what to train: zegformer, per_pixel, classifier or clip
    config.model.backbone = ConfigDict()
    config.model.backbone.kind = "resnet"  # resnet, or swin with the sizes of model.swin
    config.model.backbone.blocks = (3, 4, 6, 3)  # bottlenecks of each stage
    config.model.backbone.stem_width = 64  # channels of the 7x7 stem
    config.model.backbone.bottleneck_width = 64  # channels inside the first stage's blocks
    config.model.backbone.stage_width = 256  # channels out of the first stage
    config.model.backbone.norm = "frozen_batch"  # frozen_batch (pretrained) or group (from nothing)
    config.model.backbone.norm_groups = 32  # of the group norm; 4 or more channels each
    config.model.swin = ConfigDict()
    config.model.swin.width = 96  # channels of the first stage
    config.model.swin.depths = (2, 2, 6, 2)  # blocks of each stage
    config.model.swin.heads = (3, 6, 12, 24)  # attention heads of each stage
    config.model.swin.window = 7  # pixels of a window's side
    config.model.swin.drop_path = 0.3  # stochastic depth of the last block; linear from 0
    config.model.pixel_decoder = ConfigDict()
    config.model.pixel_decoder.width = 256  # channels of the feature pyramid
    config.model.pixel_decoder.mask_width = 256  # channels of the mask features
    config.model.pixel_decoder.norm_groups = 32  # of its group norms
    config.model.pixel_decoder.encoder_layers = 0  # transformer layers that res5 passes first
    config.model.pixel_decoder.encoder_heads = 8  # their attention heads
    config.model.pixel_decoder.encoder_mlp_width = 2048  # hidden channels of their MLPs
    config.model.pixel_decoder.dropout = 0.1  # in them
    config.model.memory = "res5"  # the backbone's map that the transformer attends to
    config.model.transformer = ConfigDict()
    config.model.transformer.queries = 100  # segments an image
    config.model.transformer.width = 256  # channels of a query
    config.model.transformer.layers = 6  # decoder layers, each with its own loss
    config.model.transformer.heads = 8  # attention heads
    config.model.transformer.mlp_width = 2048  # hidden channels of the feed-forward part
    config.model.transformer.dropout = 0.1  # of attention weights and residual branches
    config.model.transformer.project_input = True  # a 1x1 convolution of what it attends to
    # What the model starts from: another run's workdir (relative to this one), or a file: a
    # pretrained backbone or a checkpoint, see README.md; "" for nothing.
    config.model.start_from = ""

    # The baseline's word vectors (.npz of names and vectors); "" for CLIP's text embeddings.
    config.model.word_vectors = ""

    config.clip = ConfigDict()
    # A Hugging Face folder (relative to the workdir, else to the current folder) or a Hub name.
    config.clip.source = "openai/clip-vit-base-patch16"
    # Pixels of a side that CLIP sees a segment in; its positions are interpolated. 0: as trained.
    config.clip.input_size = 0
    config.clip.grouper_prompts = "imagenet_select"  # prompt set of the grouper's class logits
    config.clip.classifier_prompts = "imagenet_select_clip"  # and of the segment classifier
    # The sizes of a CLIP that is trained here (model.kind clip); not read otherwise.
    config.clip.image_size = 48  # pixels of a side
    config.clip.patch_size = 8  # pixels of a side
    config.clip.vision_width = 128  # channels of the image tower
    config.clip.vision_layers = 4  # its blocks
    config.clip.vision_heads = 4  # its attention heads
    config.clip.text_width = 128  # channels of the text tower
    config.clip.text_layers = 2  # its blocks
    config.clip.text_heads = 4  # its attention heads
    config.clip.vocab_size = 2048  # tokens, at most
    config.clip.context_length = 32  # tokens of a caption, at most
    config.clip.embed_dim = 128  # joint embedding
    config.clip.initial_logit_scale = 1 / 0.07  # factor on cosines at the start; CLIP, section 2.5

    config.dataset = ConfigDict()
    config.dataset.name = "openmoji_voc"  # see zegformer_jax/input/datasets.py
    # Prepared records, or one's own folder; relative to the workdir, or gs://...
    config.dataset.directory = "records"
    # Of the labels: a name in data/vocabularies, or a file's path; "" for the directory's own
    # classes.json.
    config.dataset.vocabulary = "openmoji_voc"
    config.dataset.all_seen = False  # train on every class's labels, as the supervised models do
    # Of a data set that is generated: its numbers of scenes, their side in pixels and their seed.
    config.dataset.options = ConfigDict()

    config.input = ConfigDict()
    config.input.batch_size = 32  # images a step, over all devices
    config.input.crop_size = 512  # pixels
    config.input.short_sides = tuple(int(512 * s / 10 + 0.5) for s in range(5, 21))  # drawn from
    config.input.max_long_side = 2048  # pixels, of a resized training picture
    # Leave out of the training what shows no seen class; the published system does not.
    config.input.skip_unseen_pictures = False
    config.input.threads = 0  # that read and augment, in training and evaluation; 0: one a core
    config.input.prefetch = 2  # batches ready ahead of the step; bounds the memory of the host

    config.loss = ConfigDict()
    config.loss.class_weight = 1.0  # of the cross entropy
    config.loss.mask_weight = 20.0  # of the focal loss
    config.loss.dice_weight = 1.0  # of the dice loss
    config.loss.no_object_weight = 0.1  # of a "no object" query in the cross entropy
    config.loss.max_targets = 32  # segments an image that are kept; more are counted as overflow

    config.optimiser = ConfigDict()
    config.optimiser.learning_rate = 1e-4  # the largest
    config.optimiser.weight_decay = 1e-4  # decoupled
    config.optimiser.clip_norm = 0.01  # the gradient's largest global norm; 0 turns it off
    config.optimiser.power = 0.9  # of the polynomial decay to 0
    config.optimiser.warmup_steps = 0  # of a linear rise before it
    # Parameters by path (regular expression of the whole path) and their factors.
    config.optimiser.groups = (
        ("backbone/.*", {"learning_rate": 0.1}),
        (".*norm.*", {"weight_decay": 0.0}),
        ("transformer/query_embedding", {"weight_decay": 0.0}),
    )

    config.train = ConfigDict()
    config.train.steps = 10_000  # of the whole training
    config.train.log_every = 50  # steps between lines of metrics
    config.train.checkpoint_every = 1000  # steps
    config.train.keep_checkpoints = 2  # the latest, besides the best by validation
    config.train.validate_every = 0  # steps between evaluations, besides the last; 0: none
    config.train.accumulate = 1  # parts that a batch is worked through in, to save memory
    config.train.remat = False  # compute the backbone again in the backward pass, to save memory
    config.train.ema = 0.0  # share of the old in the averages of parameters, e.g. 0.999; 0: none
    config.train.most_skipped = 5  # steps in a row whose loss or gradient may be not finite
    config.train.tensorboard = True  # write TensorBoard's events beside metrics.jsonl

    config.sharding = ConfigDict()
    # The mesh's axis over which parameters and optimiser state are split: "" replicates them,
    # data is FSDP, model splits them over the devices that share a batch's rows.
    config.sharding.params = ""
    config.sharding.model = 1  # devices that share a batch's rows

    config.eval = ConfigDict()
    # Vocabularies to report, names in data/vocabularies; their classes are in the data set's
    # vocabulary. The first is the headline. None: the data set's, whole.
    config.eval.vocabularies = ()
    config.eval.checkpoint = "latest"  # or best, by the harmonic mIoU of its validation
    config.eval.dtype = "float32"  # what evaluation and prediction compute in, or bfloat16
    config.eval.batch_size = 8  # images a step of a host, over its devices; changes no result
    config.eval.short_side = 512  # pixels that the shorter side is resized to
    config.eval.max_long_side = 2048  # pixels
    # Test-time augmentation: shorter sides of further versions of a picture, whose maps are
    # averaged with the first's. detectron2's are 400, 500, ..., 1200 and flip (max_long_side 4000).
    config.eval.more_short_sides = ()
    config.eval.flip = False  # also see each version mirrored
    config.eval.grouper_prompts = ""  # prompt set of the grouper's class logits; "": as trained
    config.eval.scores = "ensemble"  # grouper, clip, ensemble or ensemble_all
    config.eval.ensemble_weight = 2 / 3  # of the grouper on seen classes; paper, section 4.1
    # How segments are classified: crops (CLIP sees a crop of each), or one_pass (CLIP sees the
    # whole image once, squeezed into its square, and a token per segment attends within the
    # segment: far less work, another accuracy than the published system's).
    config.eval.segment_classifier = "crops"
    config.eval.crop_style = "cropmask"  # what a crop shows: cropmask, crop or mask
    config.eval.one_pass_layers = 4  # of CLIP, the last ones, in which segments are apart
    config.eval.resize = "after"  # to the picture's size: after the sum over queries, or before
    config.eval.gamma = 0.1  # subtracted from the seen classes' scores
    config.eval.sweep_gamma = ""  # others to report eval.scores with, first:last:step, 0:0.3:0.05
    config.eval.clip_chunk = 0  # segments that CLIP encodes at once; 0: 4 on a CPU, else 25
    config.eval.methods = ()  # ways of scoring to report, as eval.scores; none: all of them
    config.eval.oracles = True  # also measure how segments fit, and segments and names apart
    # Segments whose weight is below this in every pixel are not shown to CLIP; 0 changes nothing.
    config.eval.skip_below = 0.0
    config.eval.top_segments = 0  # so many that CLIP names, the grouper the others; 0: all
    return config.lock()


def set_variant(config: ConfigDict, name: str, baseline_backbone: str) -> None:
    """Gives an unlocked config one of `BACKBONES`, or makes it the baseline's (`per_pixel`).

    Raises:
        ValueError: the name is neither.
    """
    if name == "per_pixel":
        config.model.kind, name = name, baseline_backbone
    if name not in BACKBONES:
        raise ValueError(f"no variant '{name}': choose per_pixel or {', '.join(BACKBONES)}")
    for section, fields in BACKBONES[name].items():
        config.model[section].update(fields)
    if "swin" in BACKBONES[name]:
        config.model.backbone.kind = "swin"  # its positions' biases are not decayed
        config.optimiser.groups += ((".*relative_position_bias", {"weight_decay": 0.0}),)
