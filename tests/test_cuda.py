"""What only a CUDA GPU can show: the numbers of the CPU, and no waiting for it. `make gpu` runs these."""

import copy
import json

import pytest
import torch
from conftest import losses, scrambled, tiny
from torch.nn.modules.module import register_module_forward_pre_hook

from model import GPT, KVCache
from support.machine.runtime import Runtime
from support.sampling.decoding import generate
from support.sampling.graphs import in_cuda_graph
from support.training import fsdp
from support.training.loss import ChunkedLoss
from support.training.optim import make_optimizer
from support.training.state import State

pytestmark = pytest.mark.cuda
MODELS = [{}, {'bias': True}, {'pos_emb': 'rope', 'qk_norm': True, 'n_kv_head': 1, 'value_residual': True},
          {'pos_emb': 'alibi', 'norm': 'rmsnorm', 'activation': 'swiglu'},
          {'attn_type': 'GK'}, {'attn_type': 'PA_relu'},
          {'ngram': 3, 'ngram_rows': 64, 'logit_softcap': 5.0, 'tie_weights': False}]


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
    """The logits, the loss and all gradients, on the CPU. lean: by logits of ten positions at a time."""
    device, how = next(model.parameters()).device, {'loss': ChunkedLoss(model, 10 * 64)} if lean else {}
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logits, loss = model(x.to(device), y.to(device), **how)
    loss.backward()
    found = [loss, *(p.grad for p in model.parameters())]
    return None if logits is None else logits.detach().cpu(), [t.detach().float().cpu() for t in found]


def assert_close(found, expected, share):
    """Each tensor within `share` of the other's norm; in 16 bits all of them together."""
    if share >= 0.01:
        found, expected = ([torch.cat([t.flatten() for t in tensors])] for tensors in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= share * b.norm() + 1e-6, (a.shape, (a - b).norm() / b.norm())


@pytest.mark.parametrize('options', MODELS, ids=str)
@pytest.mark.parametrize('dtype, share', [(None, 1e-4), (torch.bfloat16, 0.1)], ids=['float32', 'bfloat16'])
def test_logits_loss_and_gradients_equal_those_of_the_cpu(options, dtype, share):
    cpu, gpu = pair(**options)
    x, y = batch()
    expected, found = results(cpu, x, y), results(gpu, x, y, dtype)
    assert_close([found[0]], [expected[0]], share)
    assert_close(found[1], expected[1], share)


@pytest.mark.parametrize('dtype, share', [(None, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize('cap', [0.0, 5.0])
def test_lean_loss_equals_that_of_the_cpu(dtype, share, cap):
    cpu, gpu = pair(logit_softcap=cap)
    x, y = batch()
    y[0, 5:] = -1
    assert_close(results(gpu, x, y, dtype, lean=True)[1], results(cpu, x, y)[1], share)


@pytest.mark.parametrize('options', MODELS[:4], ids=str)
def test_compiled_model_equals_the_uncompiled_one(options):
    _, model = pair(**options)
    compiled = copy.deepcopy(model)
    compiled.compile()
    x, y = batch()
    assert_close(results(compiled, x, y, lean=True)[1], results(model, x, y)[1], 1e-4)


@pytest.mark.parametrize('draw', [
    {'temperature': 0}, {'temperature': 0.8, 'top_k': 20}, {'top_p': 0.9, 'min_p': 0.01, 'n_vocab': 60},
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
def test_graph_is_made_in_bfloat16_and_decodes_the_same_text_again(options):
    model, idx = scrambled(tiny(**options), 0.3).eval().cuda(), torch.zeros(1, 3, dtype=torch.int64).cuda()
    with torch.autocast('cuda', torch.bfloat16), torch.inference_mode():
        texts = [generate(model, idx, 20, 0.8, n_samples=3, seeds=range(3)) for _ in range(2)]
        cache = KVCache(32)
        model(idx, cache=cache)
        made, _ = in_cuda_graph(model, cache, torch.tensor([4]).cuda(), lambda: None)
    assert torch.equal(*texts) and made is not cache


def test_model_that_somebody_watches_is_seen_at_each_token():
    model, seen = tiny().eval().cuda(), []
    model.transformer.h[1].register_forward_hook(lambda *_: seen.append(1))
    generate(model, torch.zeros(1, 3, dtype=torch.int64).cuda(), 20)
    assert len(seen) == 20


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_updates_equal_those_of_the_cpu(optimizer):
    settings = {'learning_rate': 1e-3, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'muon_lr': 0.02,
                'embedding_lr': 0.0, 'optimizer': optimizer}
    (x, y), models, moved = batch(), pair(bias=False), []
    for model in models:
        before = [p.detach().cpu().clone() for p in model.parameters()]
        opt = make_optimizer(model, settings, next(model.parameters()).device.type)
        for _ in range(3):
            results(model, x, y)
            opt.step()
            opt.zero_grad()
        moved.append([p.detach().cpu() - old for p, old in zip(model.parameters(), before)])
    assert_close(moved[1], moved[0], 0.1)  # Muon's products are in bfloat16


@pytest.mark.parametrize('args', [
    ('--dtype=bfloat16',), ('--dtype=bfloat16', '--optimizer=muon'), ('--dtype=float16',),
    ('--dtype=float16', '--optimizer=muon')], ids=' '.join)
def test_iteration_that_is_not_logged_does_not_wait_for_the_gpu(args, train):
    passes = []

    def watch(module, _):
        if isinstance(module, GPT) and module.training:
            passes.append(1)
            is_watched = 7 <= len(passes) <= 12  # iterations 3 to 5, of two passes each
            torch.cuda.set_sync_debug_mode('error' if is_watched else 'default')

    hook = register_module_forward_pre_hook(watch)
    try:
        train('--device=cuda', '--max_iters=7', '--log_interval=1000', '--eval_interval=1000',
              '--dropout=0.1', '--gradient_accumulation_steps=2', *args)
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode('default')
    assert len(passes) == 16


# ---------------------------------------------------------------------------- runs

def run_on_gpu(run_script, char_data, out_dir, *args, env=None):
    sizes = ('--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--batch_size=8')
    return run_script('train.py', *sizes, '--gradient_accumulation_steps=2', '--warmup_iters=2',
                      '--eval_iters=2', '--learning_rate=1e-3', '--plot=False', '--eval_interval=5',
                      '--max_iters=10', '--device=cuda', '--compile=False', f'--data_dir={char_data}',
                      f'--out_dir={out_dir}', *args, env=env).stdout


@pytest.mark.parametrize('args', [
    ('--dtype=float16',), ('--dtype=float16', '--optimizer=muon'), ('--dtype=bfloat16', '--compile=True'),
    ('--dtype=bfloat16', '--compile=True', '--activation_checkpointing=True'),
    ('--dtype=bfloat16', '--parallel=fsdp', '--sample_interval=3'),
    ('--dtype=bfloat16', '--parallel=fsdp', '--compile=True')], ids=' '.join)
def test_run_learns_what_one_in_float32_does(args, run_script, char_data, tmp_path):
    expected = losses(run_on_gpu(run_script, char_data, tmp_path / 'float32', '--dtype=float32',
                                 *(a for a in args if 'optimizer' in a)))
    found = losses(run_on_gpu(run_script, char_data, tmp_path / 'other', *args))
    assert expected.keys() == found.keys()
    assert all(abs(found[i] - expected[i]) < 0.1 for i in found)
    assert found[10] < found[0]


@pytest.mark.parametrize('args', [('--dtype=bfloat16',), ('--dtype=float16', '--optimizer=muon'),
                                  ('--dtype=bfloat16', '--parallel=fsdp')], ids=' '.join)
def test_resumed_run_equals_the_uninterrupted_one(args, run_script, char_data, tmp_path):
    args = (*args, '--dropout=0.2')
    run_on_gpu(run_script, char_data, tmp_path / 'whole', *args)
    run_on_gpu(run_script, char_data, tmp_path / 'cut', *args, '--max_iters=4')
    run_on_gpu(run_script, char_data, tmp_path / 'cut', *args, '--init_from=resume')
    logs = []
    for name in ('whole', 'cut'):
        lines = map(json.loads, (tmp_path / name / 'log.jsonl').read_text().splitlines())
        logs.append({e['iter']: e['loss'] for e in lines if 'loss' in e})
    assert logs[0] == logs[1] and len(logs[0]) == 11
    weights = [State.load(tmp_path / name / 'latest.pt').model for name in ('whole', 'cut')]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize('args', [
    (), ('--optimizer=muon', '--pos_emb=rope', '--value_residual=True', '--sample_interval=4')], ids=' '.join)
def test_cuda_graphs_of_the_compiler_compute_what_their_kernels_do_one_by_one(args, run_script, char_data,
                                                                              tmp_path):
    found = []
    for graphs in ('0', '1'):
        run_on_gpu(run_script, char_data, tmp_path / graphs, '--compile=True', '--dropout=0.2',
                   '--log_interval=1', '--gradient_accumulation_steps=1', *args,
                   env={'TORCHINDUCTOR_CUDAGRAPHS': graphs})
        lines = map(json.loads, (tmp_path / graphs / 'log.jsonl').read_text().splitlines())
        found.append([(e['iter'], e.get('loss'), e.get('val_loss')) for e in lines])
    assert found[0] == found[1] and len(found[0]) > 10


def test_sharded_model_holds_its_weights_in_float32_and_computes_in_bfloat16():
    model, (x, y) = tiny(bias=False), batch()
    expected = results(copy.deepcopy(model).cuda(), x, y, torch.bfloat16)[1][0]
    lean, run = ChunkedLoss(model, 10 * 64), Runtime('cuda', 'bfloat16', False, 'nccl')
    try:
        sharded = fsdp.shard(model, run)
        with run.autocast():
            loss = sharded(x.cuda(), y.cuda(), loss=lean)[1]
        loss.backward()
        assert {p.dtype for p in sharded.parameters()} == {p.grad.dtype for p in sharded.parameters()} \
            == {torch.float32}
        assert abs(loss.item() - expected.item()) < 0.02
    finally:
        torch.distributed.destroy_process_group()
