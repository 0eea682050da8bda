"Saliency maps of many architectures, each with the layer found for it; the model is left as it was."
import numpy as np
import pytest
import timm
import torch
from torch import nn

from kdmed.models.create import add_distillation_token, stage_names
from kdmed.evaluate.saliency import saliency_layers, saliency_maps

pytest.importorskip('pytorch_grad_cam')

ARCHITECTURES = { # name: image side, options, layer
    'test_resnet': (64, {}, 'layer4'),
    'resnet10t': (64, {}, 'layer4'),
    'test_convnext': (64, {}, 'stages.3'),
    'test_efficientnet': (64, {}, 'blocks.4'),
    'mobilenetv3_small_050': (64, {}, 'blocks.5'),
    'regnetx_002': (64, {}, 's4'),
    'densenet121': (64, {}, 'features.norm5'),
    'edgenext_xx_small': (64, {}, 'stages.3'),
    'coatnet_nano_rw_224': (64, {'img_size': 64}, 'stages.3'),
    'swin_tiny_patch4_window7_224': (64, {'img_size': 64, 'embed_dim': 24, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8)}, 'layers.3'),
    'swinv2_cr_tiny_ns_224': (64, {'img_size': 64, 'embed_dim': 24, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8)}, 'stages.3'),
    'mixer_s16_224': (64, {'img_size': 64}, 'blocks.7.norm1'),
    'cait_xxs24_224': (64, {'img_size': 64, 'depth': 3}, 'blocks.2.norm1'),
    'xcit_nano_12_p16_224': (64, {'depth': 3}, 'blocks.2.norm1'),
}
VITS = {
    'test_vit': (64, {'img_size': 64}),
    'test_vit2': (64, {'img_size': 64}),
    'test_vit3': (64, {'img_size': 64}),
    'vit_tiny_patch16_224': (48, {'img_size': (48, 32)}),
    'vit_wee_patch16_reg1_gap_256': (64, {'img_size': 64, 'depth': 3}),
    'deit_tiny_distilled_patch16_224': (64, {'img_size': 64, 'depth': 3}),
    'deit3_small_patch16_224': (32, {'img_size': 32, 'depth': 3}),
    'eva02_tiny_patch14_224': (56, {'img_size': 56, 'depth': 3}),
    'beit_base_patch16_224': (32, {'img_size': 32, 'depth': 2, 'embed_dim': 96, 'num_heads': 3}),
    'vit_relpos_small_patch16_224': (32, {'img_size': 32, 'depth': 3}),
    'vit_small_patch16_dinov3': (64, {'img_size': 64, 'depth': 3}),
}


def make(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    for p in model.get_classifier().parameters() if isinstance(model.get_classifier(), nn.Module) else (): nn.init.normal_(p, std=.02) # a mixer's starts at zero
    return model


def images(size, options):
    side = options.get('img_size', size)
    return torch.randn(3, 3, *(side if isinstance(side, tuple) else (side, side)), generator=torch.Generator().manual_seed(1))


def state(model):
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training, getattr(m, 'fused_attn', None)) for m in model.modules()]
    return hooks, [(p.requires_grad, p.grad) for p in model.parameters()]


def check(heat, x):
    assert heat.shape == (len(x), *x.shape[2:]) and heat.dtype == np.float32
    assert heat.min() >= 0 and heat.max() <= 1 and np.isfinite(heat).all()
    assert (np.ptp(heat.reshape(len(x), -1), axis=1) > .9).any(), 'all maps are constant'


@pytest.mark.parametrize('name', [*ARCHITECTURES, *VITS])
def test_grad_cam_finds_its_layer(name):
    size,options,*layer = (ARCHITECTURES | VITS)[name]
    model = make(name, options)
    x,before = images(size, options),state(model)
    assert saliency_layers(model) == (layer or [f'{stage_names(model)[-1]}.norm1'])
    with torch.no_grad(): logits = model(x)
    heat = np.concatenate([saliency_maps(model, x, t) for t in range(3)])
    check(heat, torch.cat([x]*3))
    assert state(model) == before
    with torch.no_grad(): assert torch.equal(model(x), logits)


@pytest.mark.parametrize('name', VITS)
def test_rollout_of_vits(name):
    size,options = VITS[name]
    model = make(name, options)
    x,before = images(size, options),state(model)
    check(saliency_maps(model, x, method='rollout'), x)
    assert state(model) == before


@pytest.mark.parametrize('name', [n for n in ARCHITECTURES if n not in ('test_efficientnet', 'mobilenetv3_small_050', 'test_convnext', 'regnetx_002')])
def test_rollout_is_refused_elsewhere(name):
    size,options,_ = ARCHITECTURES[name]
    model = make(name, options)
    before = state(model)
    with pytest.raises(ValueError, match='rollout needs'): saliency_maps(model, images(size, options), method='rollout')
    assert state(model) == before


def test_rollout_is_the_product_of_attentions_with_rotary_positions():
    "eva02: the attention that rollout takes is the one by which the block mixes its values"
    size,options = VITS['eva02_tiny_patch14_224']
    model,x = make('eva02_tiny_patch14_224', options),images(56, options)
    from kdmed.evaluate.saliency import _attention_layers, _attentions
    fused = {}
    layer = _attention_layers(model)[1]
    hook = layer.register_forward_hook(lambda m, i, o: fused.update(o=o))
    with torch.no_grad():
        model(x)
        by_fused = fused['o']
        with _attentions([layer]) as (seen,_): model(x)
    hook.remove()
    assert torch.allclose(fused['o'], by_fused, atol=1e-5)
    assert torch.allclose(seen[0].sum(-1), torch.ones(3, seen[0].shape[1]), atol=1e-5)


def test_maps_do_not_depend_on_batches():
    model,x = make('test_vit', {'img_size': 64}),torch.randn(5, 3, 64, 64)
    for method in ('grad-cam', 'score-cam', 'rollout', 'lime'):
        maps = [saliency_maps(model, x, 1, method, bs=bs, samples=20) for bs in (1, 3, 64)]
        assert max(np.abs(m-maps[0]).max() for m in maps) < 1e-3, method


def test_distillation_token_reads_both_tokens():
    model = add_distillation_token(make('test_vit', {'img_size': 64})).eval()
    x = torch.randn(3, 3, 64, 64)
    heat = saliency_maps(model, x, method='rollout')
    model.position = 0 # the class token alone
    assert np.abs(saliency_maps(model, x, method='rollout') - heat).max() > 1e-3
    check(saliency_maps(model, x, 0), x)


def test_compiled_and_half_precision():
    model,x = make('test_resnet', {}),torch.randn(2, 3, 64, 64)
    assert np.array_equal(saliency_maps(torch.compile(model), x, 1), saliency_maps(model, x, 1))
    full = saliency_maps(model, x, 1)
    assert np.abs(saliency_maps(model.bfloat16(), x, 1) - full).mean() < .1


def test_an_interrupted_map_leaves_no_hooks():
    model = make('test_vit', {'img_size': 64})
    before = state(model)
    class Stop(KeyboardInterrupt): pass
    def stop(*_): raise Stop
    handle = model.blocks[5].mlp.register_forward_hook(stop)
    for method in ('grad-cam', 'score-cam', 'rollout', 'lime'):
        with pytest.raises(Stop): saliency_maps(model, torch.randn(2, 3, 64, 64), 1, method)
    handle.remove()
    assert state(model) == before


def test_an_index_error_is_not_swallowed():
    "grad-cam's own context manager prints it and goes on"
    class Wrong(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 4, 3)
        def forward(self, x):
            self.conv(x)
            raise IndexError('inside')
    with pytest.raises(IndexError, match='inside'): saliency_maps(Wrong(), torch.randn(2, 3, 8, 8), 1, layer='conv')
