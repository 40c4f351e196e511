"""Which parameters decay."""

from fastjepa.model import Encoder, Predictor
from fastjepa.optim.param_groups import param_groups


def networks() -> tuple[Encoder, Predictor]:
    encoder = Encoder(width=16, depth=2, heads=2, mlp_width=32, levels=(0, 1))
    return encoder, Predictor(encoder_width=16, num_levels=2, width=16, depth=1, heads=2)


def test_biases_and_one_dimensional_parameters_do_not_decay() -> None:
    modules = networks()
    groups = param_groups(modules, 0.04)
    free = {id(p) for g in groups if not g["decay"] for p in g["params"]}
    decayed = {id(p) for g in groups if g["decay"] for p in g["params"]}
    for module in modules:
        for name, parameter in module.named_parameters():
            stays = name.endswith(".bias") or parameter.ndim == 1
            assert (id(parameter) in free) == stays, name
            assert (id(parameter) in decayed) != stays, name
    assert all(g["weight_decay"] == (0.04 if g["decay"] else 0.0) for g in groups)


def test_mask_tokens_and_modality_embeddings_decay_as_in_the_reference() -> None:
    encoder, predictor = networks()
    decayed = {
        id(p) for g in param_groups((encoder, predictor), 0.1) if g["decay"] for p in g["params"]
    }
    wanted = (encoder.img_mod_embed, predictor.video_mod_embed, *predictor.mask_tokens)
    assert all(id(parameter) in decayed for parameter in wanted)


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    encoder, predictor = networks()
    predictor.predictor_norm.requires_grad_(False)
    listed = [p for g in param_groups((encoder, predictor), 0.1) for p in g["params"]]
    trained = [p for m in (encoder, predictor) for p in m.parameters() if p.requires_grad]
    assert len(listed) == len(trained)
    assert {id(p) for p in listed} == {id(p) for p in trained}
