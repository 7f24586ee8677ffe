"""Compiles whole dispatches of speculative decoding for GPUs that are not here.

    make aot
    PYTHONPATH=.:.aot python tools/compile_dispatch.py --models=qwen3_8b --every

R rounds of draft, verify and commit are one program. For each model and GPU it
is compiled from abstract weights, and must call the kernels of that GPU, move
nothing to or from the host, hold no branch and no loop that the host decides,
and fit the memory. The first GPU gets every setting, the others the first, or
all with --every. Needs the packages of the extra `aot`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
from absl import app, flags

from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.networks import DrafterConfig, TargetConfig
from dflash_jax.proposal import Drafting
from dflash_jax.sampling import Sampling
from dflash_jax.target import Target
from dflash_jax.weights.drafter_names import drafter_table
from dflash_jax.weights.quantization import quantize
from pallas_kernels import ahead
from pallas_kernels.devices import TARGETS as DESCRIPTIONS

CAPACITY, NEW_TOKENS, ROUNDS = 32768, 2048, 8
TARGETS = {
  "smollm2_135m": TargetConfig(
    family="llama",
    num_layers=30,
    width=576,
    mlp_width=1536,
    num_heads=9,
    num_kv_heads=3,
    head_width=64,
    vocab_size=49152,
    rotary_base=1e5,
    tied_head=True,
  ),
  "qwen3_8b": TargetConfig(
    family="qwen3",
    num_layers=36,
    width=4096,
    mlp_width=12288,
    num_heads=32,
    num_kv_heads=8,
    head_width=128,
    vocab_size=151936,
    rotary_base=1e6,
    qk_norm=True,
  ),
}
TAPS = {"smollm2_135m": (1, 8, 14, 20, 27), "qwen3_8b": (1, 9, 17, 25, 33)}
BLOCKS = {"smollm2_135m": (3, 8), "qwen3_8b": (5, 16)}  # layers, block size
KERNELS = ("lm_head_verify", "block_attention", "block_verify", "fp8_matmul")
HOST = ("infeed", "outfeed", "send", "recv", "copy-start", "conditional")


@dataclasses.dataclass(frozen=True)
class Setting:
  """How a model is run.

  Attributes:
    batch: rows.
    rule: of verification; the block rule weighs drawn drafts.
    temperature: of target and drafter.
    tree_nodes: of a tree, or 0 for a chain.
    fp8: whether the drafter's kernels are in 8 bits.
  """

  batch: int = 1
  rule: str = "greedy"
  temperature: float = 0.0
  tree_nodes: int = 0
  fp8: bool = False

  @property
  def kernels(self) -> tuple[str, ...]:
    """What its dispatch must call."""
    decides = "block_verify" if self.rule == "block" else "lm_head_verify"
    return "block_attention", decides, *(("fp8_matmul",) if self.fp8 else ())


SETTINGS = (
  Setting(),
  Setting(4, "coupled", 1.0),
  Setting(1, "block", 1.0),
  Setting(tree_nodes=64),
  Setting(fp8=True),
)
FEW = 1  # of them, for all GPUs but the first
RESULT = "dispatch: "  # begins a line of a child's output
TIMEOUT = 1800  # seconds for one model on one GPU


def drafter_of(model: str) -> DFlash:
  """A drafter of the target's shape, as published ones are."""
  target = TARGETS[model]
  num_layers, block_size = BLOCKS[model]
  return DFlash(
    DrafterConfig(
      num_layers=num_layers,
      width=target.width,
      mlp_width=target.mlp_width,
      num_heads=target.num_heads,
      num_kv_heads=target.num_kv_heads,
      head_width=target.head_width,
      vocab_size=target.vocab_size,
      block_size=block_size,
      mask_token_id=16,
      target_layer_ids=TAPS[model],
      num_target_layers=target.num_layers,
      target_width=target.width,
      rotary_base=target.rotary_base,
    )
  )


def dispatch_of(
  model: str, setting: Setting
) -> tuple[Decoder, ModelParams, DecodeState]:
  """The loop, and its operands as shapes."""
  target, drafter = Target(TARGETS[model]), drafter_of(model)
  sampling = Sampling(setting.temperature)
  decoder = Decoder(
    target=target,
    drafter=drafter,
    drafting=Drafting(
      setting.tree_nodes or drafter.max_drafts,
      is_tree=setting.tree_nodes > 0,
      sampling=sampling,
      is_coupled=setting.rule == "coupled",
    ),
    rule=setting.rule,
    sampling=sampling,
    stop_ids=(2,),
    rounds_per_dispatch=ROUNDS,
    dtype="bfloat16",
  )
  key = jax.random.key(0)
  target_params = jax.eval_shape(lambda: target.init(key, "bfloat16"))

  def init_drafter():
    params = drafter.init(key, "bfloat16")
    table = drafter_table(drafter.config)
    return quantize(params, table) if setting.fp8 else params

  params = ModelParams(
    target=target_params,
    drafter=jax.eval_shape(init_drafter),
    borrowed=Borrowed(
      embedding=target_params["embedding"],
      head=target_params["head"]["kernel"],
      head_ids=None,
    ),
  )
  state = jax.eval_shape(
    lambda: decoder.init_state(setting.batch, CAPACITY, NEW_TOKENS)
  )
  return decoder, params, state


def compile_dispatch(
  target: str, decoder: Decoder, params: ModelParams, state: DecodeState
) -> jax.stages.Compiled:
  """The jitted call that the decode loop makes, for a described GPU."""
  device, placed = ahead.describe(target)
  place = functools.partial(
    jax.tree.map,
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
  )
  with jax.default_device(device):
    traced = Decoder.run_rounds.trace(decoder, place(params), place(state))
    return traced.lower().compile()


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """What a compiled dispatch is made of.

  Attributes:
    model, target, setting: what was compiled.
    kernels: calls of our kernels, by name.
    fusions: kernels that XLA made.
    loops: trip counts of its loops; 0 where the compiler knows none.
    host: instructions that move data to or from the host, call it, or wait for
      it to choose a branch.
    argument_bytes, temporary_bytes: of device memory.
  """

  model: str
  target: str
  setting: Setting
  kernels: dict[str, int]
  fusions: int
  loops: list[int]
  host: list[str]
  argument_bytes: int
  temporary_bytes: int

  def __str__(self) -> str:
    """A line of the table, but for the verdict."""
    setting = self.setting
    calls = "+".join(str(self.kernels.get(name, 0)) for name in KERNELS)
    return (
      f"{self.model:13}{self.target:6}{setting.batch:6}{setting.rule:>9}"
      f"{setting.tree_nodes:5}{calls:>12}{self.fusions:8}"
      f"{','.join(map(str, self.loops)):>7}{self.argument_bytes / 1e9:9.2f} GB"
      f"{self.temporary_bytes / 1e6:9.0f} MB"
    )

  def faults(self, memory_bytes: int) -> list[str]:
    """What is wrong with it; nothing, if all is well."""
    wanted = self.setting.kernels
    missing = [name for name in wanted if not self.kernels.get(name)]
    found = [f"no {name} kernel in it" for name in missing]
    found += [f"{what} needs the host" for what in self.host]
    if 0 in self.loops:
      found.append("a loop of unknown length")
    total = self.argument_bytes + self.temporary_bytes
    if total > memory_bytes:
      found.append(f"{total} bytes do not fit in {memory_bytes}")
    return found


def examine(text: str) -> tuple[dict[str, int], int, list[int], list[str]]:
  """Kernels, fusions, trip counts and needs of the host, of a program."""
  calls = re.findall(r'custom_call_target="mosaic_gpu[^\n]*', text)
  kernels = collections.Counter(
    name for call in calls for name in KERNELS if name in call
  )
  loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
  counts = [re.search(r'known_trip_count":{"n":"(\d+)"', x) for x in loops]
  host = re.findall(
    r" (infeed|outfeed|send|recv|copy-start|conditional)\(", text
  )
  host += re.findall(r'custom_call_target="([^"]*callback[^"]*)"', text)
  return (
    dict(kernels),
    len(re.findall(r" fusion\(", text)),
    [int(count[1]) if count else 0 for count in counts],
    host,
  )


def memory_of(target: str) -> int:
  """Bytes of device memory, as the description says."""
  text = (DESCRIPTIONS / f"{target}.txtpb").read_text()
  found = re.search(r"device_memory_size: (\d+)", text)
  assert found is not None, f"{target}.txtpb does not say device_memory_size"
  return int(found[1])


def compile_all(target: str, model: str, count: int) -> None:
  """Compiles a model's first settings for one GPU, and prints a line each."""
  for setting in SETTINGS[:count]:
    compiled = compile_dispatch(target, *dispatch_of(model, setting))
    memory = compiled.memory_analysis()
    found = Dispatch(
      model,
      target,
      setting,
      *examine(compiled.as_text()),
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes,
    )
    print(RESULT + json.dumps(dataclasses.asdict(found)), flush=True)


def run_child(target: str, model: str, count: int) -> list[Dispatch]:
  """Compiles a model's first settings for one GPU in a process of its own.

  Raises:
    RuntimeError: what the process said, if it failed.
  """
  done = subprocess.run(
    [
      sys.executable,
      __file__,
      f"--child={count}",
      f"--targets={target}",
      f"--models={model}",
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PATH": f"{ahead.find_tools()}{os.pathsep}{os.environ['PATH']}",
      "PYTHONPATH": os.pathsep.join(sys.path),
    },
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  if done.returncode:
    raise RuntimeError(f"{model} for {target}:\n{done.stderr}")
  records = [
    json.loads(line.removeprefix(RESULT))
    for line in done.stdout.splitlines()
    if line.startswith(RESULT)
  ]
  return [
    Dispatch(**record | {"setting": Setting(**record["setting"])})
    for record in records
  ]


def main(argv: list[str]) -> None:
  """Prints the table; exits with 1 if a program is not as it should be."""
  values = flags.FLAGS
  for name, known in (
    ("targets", ("b200", "gb200", "b300", "h100")),
    ("models", tuple(TARGETS)),
  ):
    unknown = sorted(set(getattr(values, name)) - set(known))
    if unknown or len(argv) > 1:
      raise app.UsageError(
        f"--{name}: {', '.join(unknown + argv[1:])} is unknown; choose among "
        f"{', '.join(known)}"
      )
  if values.child:
    compile_all(values.targets[0], values.models[0], values.child)
    return
  sound = True
  print(
    f"{'model':13}{'GPU':6}{'batch':>6}{'rule':>9}{'tree':>5}{'kernels':>12}"
    f"{'fusions':>8}{'loops':>7}{'arguments':>12}{'temporary':>12}"
  )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = [
      (target, model, len(SETTINGS) if values.every or not index else FEW)
      for index, target in enumerate(values.targets)
      for model in values.models
    ]
    for dispatches in pool.map(run_child, *zip(*jobs, strict=True)):
      for dispatch in dispatches:
        faults = dispatch.faults(memory_of(dispatch.target))
        sound &= not faults
        print(f"{dispatch}  {'; '.join(faults) or 'ok'}", flush=True)
  print(f"kernels: {' + '.join(KERNELS)}, per round of {ROUNDS} in a dispatch")
  if not sound:
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_list("targets", ["b200", "h100"], "GPUs to compile for.")
  flags.DEFINE_list("models", list(TARGETS), "Models to compile.")
  flags.DEFINE_bool("every", False, "Compile every setting for every GPU.")
  flags.DEFINE_integer("child", 0, "Internal: compile that many settings here.")
  app.run(main)
