"""What makes a step faster and changes no result: gradients that keep their place, the residual stream in
16 bits, the kernel of attention, garbage collection, larger micro-batches, texts of one recorded step."""

import gc
import json
import weakref

import pytest
import torch
from conftest import losses, scrambled, tiny, tokens
from runs import differences, logged
from torch.nn.modules.module import register_module_forward_pre_hook

from model import GPT, GPTConfig
from support.errors import UserError
from support.machine.hardware import GPUS, attention_kernels, kernel_order
from support.sampling.decoding import Sampling, stream
from support.sampling.graphs import KEPT
from support.training.loss import ChunkedLoss
from support.training.plan import RESERVED, Setup, fewer_micro_steps, memory_needed

RUN = ('--max_iters=8', '--eval_interval=4', '--checkpoint_interval=4', '--gradient_accumulation_steps=3',
       '--dropout=0.1')


# ---------------------------------------------------------------------------- gradients in their place

@pytest.mark.parametrize('args', [(), ('--optimizer=muon', '--pos_emb=rope', '--value_residual=True')],
                         ids=['adamw', 'muon'])
def test_run_whose_gradients_keep_their_place_is_the_same_and_resumes_bit_for_bit(args, train, tmp_path):
    train(*RUN, *args, out_dir=tmp_path / 'plain')
    kept = train(*RUN, *args, '--cuda_graphs=True', out_dir=tmp_path / 'kept')
    assert 'cuda_graphs: nothing is recorded without CUDA' in kept['log']
    assert not any(p.grad.any() for p in kept['model'].parameters())  # still there
    assert logged(tmp_path / 'plain') == logged(tmp_path / 'kept')
    train(*RUN, *args, '--cuda_graphs=True', '--max_iters=3')
    train(*RUN, *args, '--cuda_graphs=True', '--init_from=resume')
    assert differences(tmp_path / 'kept', tmp_path / 'out') in ([], ['log.jsonl'])  # an evaluation more
    assert logged(tmp_path / 'kept') == logged(tmp_path / 'out')


def test_graphs_of_a_sharded_model_are_refused(train):
    with pytest.raises(UserError, match='cuda_graphs=True is for a single process with parallel=ddp'):
        train(*RUN, '--cuda_graphs=True', '--parallel=fsdp')
    torch.distributed.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize('args', [(), ('--optimizer=muon', '--pos_emb=rope', '--value_residual=True')],
                         ids=['adamw', 'muon'])
def test_recorded_kernels_of_several_micro_steps_compute_what_compiled_ones_do(args, train, tmp_path):
    args = (*RUN, *args, '--device=cuda', '--dtype=bfloat16', '--compile=True', '--sample_interval=4')
    train(*args, out_dir=tmp_path / 'compiled')
    torch._dynamo.reset()
    train(*args, '--cuda_graphs=True', out_dir=tmp_path / 'recorded')
    for name, share in (('loss', 0.01), ('grad_norm', 0.05)):  # Muon's products are compiled with them
        found, expected = (logged(tmp_path / folder, name) for folder in ('recorded', 'compiled'))
        assert found == pytest.approx(expected, rel=share), name


# ---------------------------------------------------------------------------- 16 bits

@pytest.mark.parametrize('options', [{}, {'norm': 'rmsnorm', 'pos_emb': 'rope', 'value_residual': True,
                                          'x0_residual': True, 'embd_norm': True, 'qk_norm': True}], ids=str)
def test_residual_stream_in_16_bits_differs_by_rounding(options):
    model, (x, y) = scrambled(tiny(**options)), (tokens(4, 32), tokens(4, 32))
    types, found = [], []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, args, out: types.append((args[0].dtype, out.dtype)))
    for model.residual_16bit in (False, True):
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(x, y)[1]
        grads = torch.autograd.grad(loss, [*model.parameters()])
        found.append((loss.item(), torch.cat([g.flatten() for g in grads])))
    assert types == [(torch.float32,) * 2] * 2 + [(torch.bfloat16,) * 2] * 2
    (loss, grad), (loss_16, grad_16) = found
    assert loss_16 == pytest.approx(loss, rel=0.01) and grad_16.dtype == torch.float32
    assert (grad - grad_16).norm() < 0.05 * grad.norm()
    model.residual_16bit = False
    plain = model(x, y)[1]
    model.residual_16bit = True
    assert torch.equal(plain, model(x, y)[1])  # without autocast


def test_residual_stream_in_16_bits_is_compiled_in_one_piece():
    model, idx = scrambled(tiny()), tokens(2, 16)
    model.residual_16bit = True
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss, expected = compiled(idx, idx, loss=ChunkedLoss(model, 7 * 64))[1], model(idx, idx)[1]
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_run_in_16_bits_learns_what_the_other_does(train, tmp_path):
    args = (*RUN, '--dtype=bfloat16', '--dropout=0')
    found = [losses(train(*args, f'--residual_16bit={on}', out_dir=tmp_path / str(on))['log'])
             for on in (False, True)]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], abs=0.01)


# ---------------------------------------------------------------------------- attention's kernel

@pytest.mark.parametrize('generation, window, first', [
    (9, 1024, 'CUDNN'), (10, 256, 'CUDNN'), (9, None, 'FLASH'), (9, 1000, 'FLASH'), (8, 1024, 'FLASH'),
    (12, 1024, 'FLASH'), (7, 64, 'FLASH')])
def test_cudnn_computes_attention_where_a_shape_comes_again_on_hopper(generation, window, first):
    order = kernel_order(generation, window)
    assert order[0] == f'{first}_ATTENTION' and order[-3:] == kernel_order(8)
    with attention_kernels('cpu', window):
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize('window', [256, 100])
def test_attention_on_a_gpu_has_the_kernel_of_the_rule(window):
    q = torch.randn(2, 4, window, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    with attention_kernels('cuda', window), torch.profiler.profile() as profiler:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    names = ' '.join(event.key for event in profiler.key_averages())
    is_cudnn = kernel_order(torch.cuda.get_device_capability()[0], window)[0] == 'CUDNN_ATTENTION'
    assert ('_scaled_dot_product_cudnn_attention' in names) == is_cudnn


# ---------------------------------------------------------------------------- garbage

def test_garbage_is_collected_at_evaluations_only_and_again_after_the_run(train):
    seen, collections = [], []

    def look(phase, info):
        collections.append((phase, len(seen)))

    def watch(module, _):
        if type(module).__name__ == 'GPT' and module.training:
            seen.append(gc.isenabled())
    hook = register_module_forward_pre_hook(watch)
    gc.callbacks.append(look)
    try:
        train('--max_iters=8', '--eval_interval=4', '--checkpoint_interval=0')
    finally:
        hook.remove()
        gc.callbacks.remove(look)
    assert seen == [True] + [False] * 8
    assert {n for phase, n in collections if 1 < n < 9} == {4, 8}
    assert gc.isenabled() and gc.get_freeze_count() == 0


# ---------------------------------------------------------------------------- larger micro-batches

def planned(**sizes):
    with torch.device('meta'):
        return GPT(GPTConfig(**{'bias': False, 'block_size': 1024} | sizes))


@pytest.mark.parametrize('gpu, setup, proposed', [
    ('A100', Setup(1, 12, 40), 60), ('H100', Setup(8, 12, 5), 60), ('RTX 3090', Setup(1, 12, 40), 40),
    ('T4', Setup(1, 12, 40), 24), ('H200', Setup(8, 60, 1), None), ('H200', Setup(1, 12, 1), None)], ids=str)
def test_micro_batch_that_fits_and_makes_the_same_batch_is_proposed(gpu, setup, proposed):
    model = planned()
    text = fewer_micro_steps(model, setup, GPUS[gpu].memory)
    if proposed is None:
        assert text == ''
        return
    sequences = setup.n_processes * setup.batch_size * setup.micro_steps
    assert f'--batch_size={proposed} --gradient_accumulation_steps={sequences // proposed} ' in text
    larger = Setup(setup.n_processes, proposed, setup.batch_size * setup.micro_steps // proposed)
    assert RESERVED < memory_needed(model, larger) <= 0.9 * GPUS[gpu].memory


# ---------------------------------------------------------------------------- a decoding step's memory

MODELS = [{}, {'pos_emb': 'rope', 'n_kv_head': 1, 'qk_norm': True, 'value_residual': True},
          {'pos_emb': 'alibi', 'norm': 'rmsnorm', 'x0_residual': True, 'embd_norm': True},
          {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50}, {'attn_type': 'GK'}]


def sampled(model, idx, n, static, temperature=0.8, **how):
    pieces = [*stream(model, idx, Sampling(temperature, 20, max_new_tokens=n, repetition_penalty=1.1),
                      static=static, **how)]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize('options', MODELS, ids=str)
def test_texts_of_one_memory_after_the_other_are_those_of_growing_caches(options, capsys):
    """Of different prompts, lengths and seeds, two samples each, up to the end of block_size and past it."""
    model = scrambled(tiny(**options | {'block_size': 140}), 0.3).double().eval()
    for T, n in ((9, 60), (5, 128), (40, 3), (9, 133), (139, 3), (140, 2)):
        how = {'n_samples': 2, 'seeds': range(T, T + 6), 'lengths': torch.tensor([max(1, T - 4), T, T])}
        idx = tokens(3, T)
        assert torch.equal(sampled(model, idx, n, True, **how), sampled(model, idx, n, False, **how))
    assert 'without a CUDA graph' not in capsys.readouterr().out


def test_compiler_takes_a_step_of_one_memory_whole_and_for_any_length_to_read():
    model, idx = scrambled(tiny(block_size=200, pos_emb='rope'), 0.3).double().eval(), tokens(2, 5)
    expected = sampled(model, idx, 140, False, seeds=[1, 2])
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model.compile(dynamic=True, fullgraph=True, backend='eager')
    for _ in range(2):
        assert torch.equal(sampled(model, idx, 140, True, seeds=[1, 2]), expected)


def test_texts_that_are_made_in_turns_do_not_share_a_memory():
    model, prompts = scrambled(tiny(block_size=200), 0.3).double().eval(), [tokens(1, 4), tokens(1, 4)]
    expected = [sampled(model, idx, 20, False, seeds=[1]) for idx in prompts]
    made = []
    for _ in range(2):  # the second time on what the first left behind
        both = [stream(model, idx, Sampling(0.8, 20, max_new_tokens=20, repetition_penalty=1.1), seeds=[1],
                       static=True) for idx in prompts]
        made.append([*zip(*zip(*both))])
    for texts in made:
        assert all(torch.equal(torch.cat(found, dim=1), text) for found, text in zip(texts, expected))


def test_memory_of_a_shape_is_used_again_and_of_few_shapes_is_kept():
    """By other calls of the same shape, weights and sampling, as the keys of attention show."""
    model, seen = scrambled(tiny(block_size=200)).eval(), []

    class Seen(type(model.transformer.h[0].attn)):
        def attend(self, q, k, v, cache=None, begins=None):
            if q.shape[2] == 1:
                seen.append((k.data_ptr(), k.shape[2]))
            return super().attend(q, k, v, cache, begins)
    for block in model.transformer.h[:1]:
        block.attn.__class__ = Seen

    def places(T, n, rows=1, **how):
        seen.clear()
        sampled(model, tokens(rows, T), n, True, **how)
        return {place for place, _ in seen[2:]}, {n for _, n in seen[2:]}  # the first two compare
    first, lengths = places(4, 170)
    assert lengths == {128, 200} and len(first) == 1
    assert places(7, 150)[0] == first
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # in place, as an optimizer does
    assert places(4, 160)[0] == first
    assert places(4, 160, temperature=0.9)[0] != first != places(4, 160, n_vocab=60)[0]
    assert places(4, 160)[0] != places(4, 160, rows=2)[0]
    first = places(4, 160)[0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert places(4, 160)[0] != first
    assert len(KEPT[model]) == 2


def test_kept_memory_ends_with_its_model():
    model = tiny().eval()
    sampled(model, tokens(1, 4), 5, True)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.cuda
def test_second_text_of_a_shape_is_that_of_the_first_and_makes_no_graph():
    model, idx = scrambled(tiny(block_size=256), 0.3).eval().cuda(), tokens(2, 3).cuda()
    with torch.autocast('cuda', torch.bfloat16):
        first = sampled(model, idx, 200, None, seeds=[1, 2])
        with torch.profiler.profile() as profiler:
            second = sampled(model, idx, 200, None, seeds=[1, 2])
    names = [event.key for event in profiler.key_averages()]
    assert torch.equal(first, second) and 'cudaGraphLaunch' in names
    assert not any('StreamBeginCapture' in name for name in names)


# ---------------------------------------------------------------------------- the report

def test_report_has_the_levers_in_the_order_of_worth_and_the_cuda_tests_last(run_script, char_data, tmp_path):
    only = '--only=its attention|fast_shakespeare_char, cuda_graphs=True|124M --decode_batch=1|CUDA tests'
    output = run_script('scripts/gpu_report.py', '--tiny=True', '--device=cpu', f'--data_dir={char_data}',
                        f'--out_dir={tmp_path}', only).stdout
    attention, graphs, decoding, cuda_tests = map(
        json.loads, (tmp_path / 'results.jsonl').read_text().splitlines())
    assert attention['kernel'] == 'FlashAttention' and graphs['ms'] > 0
    assert 0 < decoding['first_token_ms'] < decoding['ms'] and 0 < decoding['of_bandwidth'] <= 1
    assert 'skipped' in cuda_tests['tests'] or 'passed' in cuda_tests['tests']
    assert 'measurements are left' not in output and not list(tmp_path.glob('*.json'))
