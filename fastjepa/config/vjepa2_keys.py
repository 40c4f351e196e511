"""What the keys of an official V-JEPA 2 or 2.1 YAML mean to us, where no arithmetic is needed."""

from fastjepa.config.key_ledger import MISSING
from fastjepa.config.schema import MaskGroup

# Official key: our key, and the official script's default where it differs from ours.
SAME_VALUE: dict[str, tuple[str, object]] = {
    "folder": ("run.folder", MISSING),
    "meta.seed": ("run.seed", 0),
    "data.fps": ("data.fps", MISSING),
    "data.crop_size": ("data.crop", 224),
    "data.patch_size": ("model.patch", MISSING),
    "data.tubelet_size": ("model.tubelet", MISSING),
    "data.num_workers": ("data.workers", 1),
    "data_aug.random_resize_aspect_ratio": ("data.augment.aspect", [3 / 4, 4 / 3]),
    "data_aug.random_resize_scale": ("data.augment.scale", [0.3, 1.0]),
    "loss.loss_exp": ("objective.loss_exp", MISSING),
    "model.interpolate_rope": ("model.interpolate_rope", False),
    "model.use_activation_checkpointing": ("model.checkpointing", False),
    "model.pred_depth": ("model.predictor.depth", MISSING),
    "model.pred_embed_dim": ("model.predictor.width", MISSING),
    "optimization.lr": ("optim.lr", MISSING),
    "optimization.weight_decay": ("optim.weight_decay", MISSING),
    "optimization.final_weight_decay": ("optim.final_weight_decay", MISSING),
    "optimization.betas": ("optim.betas", MISSING),
    "optimization.eps": ("optim.eps", MISSING),
    "optimization.loss_reg_std_mult": ("guard.sigma", MISSING),
    "optimization.loss_reg_num_tracking_steps": ("guard.window", MISSING),
}

# The same for keys that only the 2.1 script reads.
SAME_VALUE_21: dict[str, tuple[str, object]] = {
    "loss.predict_all": ("objective.dense", True),
    "loss.weight_distance_loss": ("objective.distance_weights", False),
    "loss.offset_context_loss": ("objective.offset", False),
    "model.lambda_value_vid": ("objective.context_weight.video", 0.0),
    "model.lambda_value_img": ("objective.context_weight.image", 0.0),
    "model.normalize_predictor": ("objective.normalize_predictor", False),
}

MASK_KEYS = tuple(MaskGroup.model_fields)

# Encoders: our name, and the number of heads where it is not the preset's.
ENCODERS: dict[str, tuple[str, int | None]] = {
    **{f"vit_{size}": (f"vit_{size}", None) for size in ("tiny", "small", "base", "large", "huge")},
    "vit_giant_xformers": ("vit_giant", None),
    "vit_gigantic_xformers": ("vit_gigantic", None),
    "vit_giant": ("vit_giant", 16),
    "vit_gigantic": ("vit_gigantic", 16),
}

# Keys with one value that is built in here; any other is not offered.
BUILT_IN: dict[str, object] = {
    "data.dataset_type": "VideoDataset",
    "img_data.dataset_type": "VideoDataset",
    "img_data.dataset_fpcs": [1],
    "data_aug.auto_augment": False,
    "data_aug.motion_shift": False,
    "data_aug.reprob": 0.0,
    "loss.shift_by_n": 0,
    "model.has_cls_first": False,
    "model.img_temporal_dim_size": 1,
    "model.init_type": "default",
    "model.is_causal": False,
    "model.levels_predictor": 4,
    "model.modality_embedding": True,
    "model.n_registers": 0,
    "model.n_registers_predictor": 0,
    "model.pred_is_causal": False,
    "model.use_pred_silu": False,
    "model.use_rope": True,
    "model.use_silu": False,
    "model.zero_init_mask_tokens": True,
    "optimization.use_radamw": False,
}

_CLUSTER = "cluster key"
_UNREAD = "has no effect in the official code"
_RESUME = "a run goes on from its own folder by itself"

IGNORED: dict[str, str] = {
    "nodes": f"{_CLUSTER}; used here to find the batch of a video rank",
    "tasks_per_node": f"{_CLUSTER}; used here to find the batch of a video rank",
    "cpus_per_task": _CLUSTER,
    "mem_per_gpu": _CLUSTER,
    "data.persistent_workers": "the loader always keeps its workers",
    "data.pin_mem": "the loader pins memory where a GPU reads it",
    "img_data.num_workers": "data.workers serves videos and images",
    "loss.computing_gram_loss": _UNREAD,
    "loss.gram_HighRes": _UNREAD,
    "loss.gram_ckpt": _UNREAD,
    "loss.gram_loss_weight": _UNREAD,
    "loss.reg_coeff": _UNREAD,
    "meta.eval_freq": _UNREAD,
    "meta.load_checkpoint": _RESUME,
    "meta.read_checkpoint": f"{_RESUME}; train.init_from starts from other weights",
    "meta.save_every_freq": "train.checkpoint_every counts steps, train.keep_checkpoints the kept",
    "meta.skip_batches": "a resumed run finds its place in the data by itself",
    "meta.sync_gc": "no effect on the result",
    "model.compile_model": "no effect on the result",
    "model.local_window": _UNREAD,
    "model.pred_local_window": _UNREAD,
    "model.uniform_power": "has no effect with rotary positions",
    "model.vit_conv": _UNREAD,
    "model.wide_silu": "has no effect without SwiGLU",
    "optimization.resume_anneal": _RESUME,
}
