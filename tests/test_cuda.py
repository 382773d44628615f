"""What only a CUDA GPU can show: the numbers of the CPU, and no waiting for it. `make gpu` runs these."""

import copy
import json

import pytest
import torch
from conftest import TINY, losses

from model import GPT, GPTConfig
from support.training import fsdp
from support.machine.runtime import Runtime
from support.sampling import decoding, graphs as recording
from support.training.loss import use_lean_loss
from support.training.optim import configure_optimizer
from support.training import checkpoint
from support.training.log import Meter

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
    model = GPT(GPTConfig(**TINY | options))
    return model, copy.deepcopy(model).cuda()


def batch():
    x = torch.randint(64, (4, 32))
    return x, x.roll(-1, dims=1)


def results(model, x, y, dtype=None, lean=False):
    """The logits, the loss and all gradients, on the CPU."""
    if lean:
        use_lean_loss(model)
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logits, loss = model(x.to(device), y.to(device))
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


@pytest.mark.parametrize('options', [{}, MODELS[2], MODELS[3]], ids=str)
def test_cuda_graph_in_bfloat16_decodes_the_same_text_again(options, monkeypatch):
    _, model = pair(**options)
    recorded = []
    record = recording.record
    monkeypatch.setattr(recording, 'record', lambda *args: recorded.append(1) or record(*args))
    with torch.autocast('cuda', torch.bfloat16):
        out = [decoding.generate(model.eval(), torch.zeros(1, 3, dtype=torch.int64, device='cuda'), 20,
                                 temperature=0.8, n_samples=3, seeds=range(3)) for _ in range(2)]
    assert torch.equal(*out) and len(recorded) == 2


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_updates_equal_those_of_the_cpu(optimizer, monkeypatch):
    from support.training import optim
    monkeypatch.setattr(optim, 'newton_schulz_dtype', lambda device_type: torch.float32)
    muon = {'lr_scale': 1.0, 'weight_decay': 0.1} if optimizer == 'muon' else None
    x, y = batch()
    models = pair(bias=False)
    for model in models:
        device = next(model.parameters()).device
        opt = configure_optimizer(model, 0.1, 1e-3, (0.9, 0.95), device.type, muon)
        for _ in range(5):
            results(model, x, y)
            opt.step()
            opt.zero_grad()
    assert_close([p.detach().cpu() for p in models[1].parameters()],
                 [p.detach() for p in models[0].parameters()], 1e-2)


@pytest.mark.parametrize('args', [
    ('--dtype=bfloat16',), ('--dtype=bfloat16', '--optimizer=muon', '--ema_decay=0.9'), ('--dtype=float16',),
    ('--dtype=float16', '--optimizer=muon')], ids=' '.join)
def test_iteration_that_is_not_logged_does_not_wait_for_the_gpu(args, train, monkeypatch):
    begin, n_begun = Meter.begin_iteration, []

    def watched(meter):
        n_begun.append(1)
        torch.cuda.set_sync_debug_mode('error' if 3 <= len(n_begun) <= 5 else 'default')
        begin(meter)

    monkeypatch.setattr(Meter, 'begin_iteration', watched)
    try:
        train('--device=cuda', '--max_iters=7', '--log_interval=1000', '--eval_interval=1000',
              '--dropout=0.1', '--gradient_accumulation_steps=2', *args)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(n_begun) == 8


# ---------------------------------------------------------------------------- runs

def run_on_gpu(run_script, char_data, out_dir, *args):
    sizes = ('--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--batch_size=8')
    return run_script('train.py', *sizes, '--gradient_accumulation_steps=2', '--warmup_iters=2',
                      '--eval_iters=2', '--learning_rate=1e-3', '--plot=False', '--eval_interval=5',
                      '--max_iters=10', '--device=cuda', '--compile=False', f'--data_dir={char_data}',
                      f'--out_dir={out_dir}', *args).stdout


@pytest.mark.parametrize('args', [
    ('--dtype=float16',), ('--dtype=float16', '--optimizer=muon'), ('--dtype=bfloat16', '--compile=True'),
    ('--dtype=bfloat16', '--compile=True', '--activation_checkpointing=True'),
    ('--dtype=bfloat16', '--parallel=fsdp'), ('--dtype=bfloat16', '--parallel=fsdp', '--compile=True'),
    ('--dtype=bfloat16', '--parallel=fsdp', '--cpu_offload=True', '--sample_interval=3')], ids=' '.join)
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
    weights = [checkpoint.load(tmp_path / name / 'latest.pt')['model'] for name in ('whole', 'cut')]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize('args', [
    (), ('--optimizer=muon', '--ema_decay=0.9', '--pos_emb=rope', '--value_residual=True',
         '--sample_interval=4')], ids=' '.join)
def test_cuda_graphs_of_the_compiler_compute_what_their_kernels_do_one_by_one(args, train, tmp_path,
                                                                              monkeypatch):
    """As TORCHINDUCTOR_CUDAGRAPHS=1 asks for them."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode
    record, found, n_recorded = CUDAGraphNode._record, [], []
    monkeypatch.setattr(CUDAGraphNode, '_record', lambda *a: n_recorded.append(1) or record(*a))
    for graphs in (False, True):
        monkeypatch.setattr(torch._inductor.config.triton, 'cudagraphs', graphs)
        torch._dynamo.reset()
        train('--device=cuda', '--compile=True', '--dropout=0.2', '--max_iters=12', '--log_interval=1',
              '--eval_interval=4', '--gradient_accumulation_steps=1', *args, out_dir=tmp_path / str(graphs))
        lines = map(json.loads, (tmp_path / str(graphs) / 'log.jsonl').read_text().splitlines())
        found.append([(e['iter'], e.get('loss'), e.get('val_loss')) for e in lines])
        assert bool(n_recorded) == graphs
    assert found[0] == found[1]


def test_sharded_model_holds_its_weights_in_float32_and_computes_in_bfloat16():
    model = GPT(GPTConfig(**TINY | {'bias': False}))
    expected = results(copy.deepcopy(model).cuda(), *batch(), torch.bfloat16)[1][0]
    use_lean_loss(model)
    run = Runtime('cuda', 'bfloat16', False, 'nccl')
    try:
        sharded, (x, y) = fsdp.shard(model, run), batch()
        with run.autocast():
            loss = sharded(x.cuda(), y.cuda())[1]
        loss.backward()
        assert {p.dtype for p in sharded.parameters()} == {p.grad.dtype for p in sharded.parameters()} \
            == {torch.float32}
        assert abs(loss.item() - expected.item()) < 0.02
    finally:
        torch.distributed.destroy_process_group()
