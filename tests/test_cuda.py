"""What only a CUDA GPU can show: the numbers of the CPU, and no waiting for it. `make gpu` runs these."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import losses, scrambled, tiny
from runs import differences, logged
from torch.nn.modules.module import register_module_forward_pre_hook

from model import KVCache
from support.machine.runtime import Runtime
from support.sampling.decoding import compile_for_decoding, generate
from support.sampling.graphs import in_cuda_graph
from support.sampling.quantize import build_quantized
from support.training import optim
from support.training.loss import lean_loss

pytestmark = pytest.mark.cuda
MODELS = [{}, {'bias': True}, {'pos_emb': 'rope', 'qk_norm': True, 'n_kv_head': 1, 'value_residual': True},
          {'pos_emb': 'alibi', 'norm': 'rmsnorm', 'activation': 'swiglu'},
          {'attn_type': 'GK'},
          {'ngram': 3, 'ngram_rows': 64, 'logit_softcap': 5.0, 'tie_weights': False}]
SETTINGS = {'learning_rate': 1e-3, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'muon_lr': 1e-3,
            'embedding_lr': 0.0}
ON_GPU = Runtime('cuda', 'bfloat16', False, 'nccl')


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 without TF32, which train.py turns on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


def pair(**options):
    """The same model on the CPU and on the GPU."""
    model = tiny(**options)
    return model, copy.deepcopy(model).cuda()


def batch():
    x = torch.randint(64, (4, 32))
    return x, x.roll(-1, dims=1)


def results(model, x, y, dtype=None, lean=False):
    """The logits, the loss and all gradients, on the CPU."""
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
    with autocast:
        logits, loss = model(x.to(device), y.to(device), **(lean_loss(model, ON_GPU) if lean else {}))
    loss.backward()
    found = [t.detach().float().cpu() for t in (loss, *(p.grad for p in model.parameters()))]
    return None if logits is None else logits.detach().cpu(), found


def assert_close(found, expected, share):
    """Each tensor within `share` of the other's norm; in 16 bits all of them together."""
    if share >= 0.01:
        found, expected = ([torch.cat([t.flatten() for t in tensors])] for tensors in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= share * b.norm() + 1e-6, (a.shape, (a - b).norm() / b.norm())


@pytest.mark.parametrize('options', MODELS, ids=str)
@pytest.mark.parametrize('dtype, share', [(None, 1e-4), (torch.bfloat16, 0.1)], ids=['float32', 'bfloat16'])
def test_logits_loss_and_gradients_equal_those_of_the_cpu(options, dtype, share):
    (cpu, gpu), (x, y) = pair(**options), batch()
    expected, found = results(cpu, x, y), results(gpu, x, y, dtype)
    assert_close([found[0].float()], [expected[0]], share)
    assert_close(found[1], expected[1], share)


@pytest.mark.parametrize('dtype, share', [(None, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize('cap', [0.0, 5.0])
def test_lean_loss_equals_that_of_the_cpu(dtype, share, cap):
    (cpu, gpu), (x, y) = pair(logit_softcap=cap), batch()
    y[0, 5:] = -1
    assert_close(results(gpu, x, y, dtype, lean=True)[1], results(cpu, x, y)[1], share)


@pytest.mark.parametrize('draw', [
    {'temperature': 0}, {'top_p': 0.9, 'min_p': 0.01, 'n_vocab': 60},
    {'temperature': 2.0, 'top_k': 9, 'repetition_penalty': 1.3}], ids=str)
@pytest.mark.parametrize('options', MODELS, ids=str)
def test_text_decoded_by_a_cuda_graph_is_that_of_the_cpu(options, draw, capsys):
    """In float64: prompts of different lengths, two samples each, to the end of block_size and past it."""
    model = scrambled(tiny(**options), 0.3).double().eval()
    how = {'n_samples': 2, 'seeds': range(6), **draw}
    idx, lengths, texts = torch.randint(64, (3, 9)), torch.tensor([1, 5, 9]), []
    for device in ('cpu', 'cuda'):
        model.to(device)
        texts.append(generate(model, idx.to(device), 40, lengths=lengths.to(device), **how).cpu())
    assert torch.equal(*texts)
    assert 'without a CUDA graph' not in capsys.readouterr().out


@pytest.mark.parametrize('options', [{}, MODELS[2], MODELS[3]], ids=str)
def test_graph_is_made_in_bfloat16_decodes_the_same_text_again(options):
    model, idx = scrambled(tiny(**options), 0.3).eval().cuda(), torch.zeros(1, 3, dtype=torch.int64).cuda()
    with torch.autocast('cuda', torch.bfloat16), torch.inference_mode():
        texts = [generate(model, idx, 20, 0.8, n_samples=3, seeds=range(3)) for _ in range(2)]
        cache = KVCache(32)
        model(idx, cache=cache)
        made, _ = in_cuda_graph(model, cache, torch.tensor([4]).cuda(), lambda: None)
    assert torch.equal(*texts) and made is not cache


@pytest.mark.parametrize('weights', ['full', 'int8'])
def test_compiled_step_is_recorded_and_decodes_the_text_of_the_plain_one(weights, capsys):
    """In float64, the second time from recordings for 128 and for all 200 positions."""
    model = scrambled(tiny(block_size=200), 0.3)
    if weights == 'int8':
        model = build_quantized(model.config, model.state_dict().items(), weights)
    model, idx = model.double().eval().cuda(), torch.randint(64, (1, 3)).cuda()
    expected = generate(copy.deepcopy(model), idx, 190, 0.8, seeds=[1])
    torch._dynamo.reset()
    compiled = compile_for_decoding(model)
    for _ in range(2):
        assert torch.equal(generate(model, idx, 190, 0.8, seeds=[1], compiled=compiled), expected)
    assert 'without a CUDA graph' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_updates_equal_those_of_the_cpu(name):
    models, (x, y) = pair(bias=False), batch()
    for model in models:
        device_type = next(model.parameters()).device.type
        opt = optim.make_optimizer(model, SETTINGS | {'optimizer': name}, device_type)
        for _ in range(5):
            results(model, x, y)
            opt.step()
            opt.zero_grad()
    share = 1e-2 if name == 'adamw' else 5e-2  # Muon's products may be in bfloat16 on one of them
    assert_close([p.detach().cpu() for p in models[1].parameters()],
                 [p.detach() for p in models[0].parameters()], share)


@pytest.mark.parametrize('args', [
    ('--dtype=bfloat16', '--optimizer=muon'), ('--dtype=float16',)], ids=' '.join)
def test_iteration_that_is_not_logged_does_not_wait_for_the_gpu(args, train):
    """From the first forward pass of the third iteration to that of the sixth."""
    n_passes = [0]

    def watch(module, _):
        if type(module).__name__ == 'GPT' and module.training:
            n_passes[0] += 1  # two an iteration
            torch.cuda.set_sync_debug_mode('error' if 5 <= n_passes[0] < 11 else 'default')
    hook = register_module_forward_pre_hook(watch)
    try:
        train('--device=cuda', '--max_iters=7', '--log_interval=1000', '--eval_interval=1000',
              '--dropout=0.1', '--gradient_accumulation_steps=2', *args)
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode('default')
    assert n_passes == [16]


RUN = ('--device=cuda', '--n_embd=64', '--block_size=32', '--batch_size=8', '--gradient_accumulation_steps=2',
       '--eval_interval=5', '--max_iters=10', '--dropout=0.0')


@pytest.mark.parametrize('args', [
    ('--dtype=float16', '--optimizer=muon'), ('--dtype=bfloat16', '--compile=True'),
    ('--dtype=bfloat16', '--parallel=fsdp', '--compile=True')], ids=' '.join)
def test_run_learns_what_one_in_float32_does(args, train, tmp_path):
    train(*RUN, '--dtype=float32', *(a for a in args if 'optimizer' in a), out_dir=tmp_path / 'float32')
    found = losses(train(*RUN, *args)['log'])
    assert found == pytest.approx(logged(tmp_path / 'float32'), abs=0.1) and found[10] < found[0]


@pytest.mark.parametrize('args', [('--dtype=bfloat16',), ('--dtype=float16', '--optimizer=muon'),
                                  ('--dtype=bfloat16', '--parallel=fsdp')], ids=' '.join)
def test_resumed_run_equals_the_uninterrupted_one(args, train, tmp_path):
    args = (*RUN, *args, '--dropout=0.2')
    train(*args, out_dir=tmp_path / 'whole')
    train(*args, '--max_iters=4')
    train(*args, '--init_from=resume')
    assert differences(tmp_path / 'whole', tmp_path / 'out') in ([], ['log.jsonl'])  # an evaluation more
    assert logged(tmp_path / 'whole') == logged(tmp_path / 'out')
