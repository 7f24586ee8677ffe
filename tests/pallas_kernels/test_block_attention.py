"""block_attention: its kernels against the reference, sound and with bugs."""

import pytest

from tests.pallas_kernels.interpreter import SOUND, Job, Mutant, run

CHECK = "tests.pallas_kernels.checks_block_attention:block_attention"
EXACT = "tests.pallas_kernels.checks_block_attention:rows_are_exact"
KERNELS = ("sm90", "sm100")
# No slot, one row, fewer slots than a tile; empty splits, last tiles cut short;
# more tiles than stages; two tiles of rows and of new keys; trees; windows that
# begin in any tile, or within the block; prefixes; what models are served with;
# blocks of a drafter.
SHAPES = (
  dict(tokens=1, slots=8, lengths=[0]),
  dict(tokens=3, slots=328, lengths=[131], heads=6, kv_heads=2),
  dict(tokens=5, slots=328, lengths=[0, 328], heads=3, head_width=128),
  dict(tokens=37, slots=328, lengths=[259], heads=3, tree=True, split_tiles=6),
  dict(tokens=67, slots=40, lengths=[17], heads=2, tree=True, stages=1),
  dict(tokens=5, slots=328, lengths=[300], heads=2, window=105),
  dict(tokens=67, slots=136, lengths=[130], window=3, steep=True),
  dict(tokens=2, slots=72, lengths=[5, 71], heads=2, prefix=(200, 131)),
  dict(tokens=3, slots=72, lengths=[9, 64], prefix=(136, 136), window=75),
  dict(tokens=2, slots=8, lengths=[5, 8], prefix=(72, 70), member=[0, 1]),
  dict(tokens=11, slots=328, lengths=[327], split_tiles=6, rising=True),
  dict(tokens=7, slots=200, lengths=[199], heads=9, kv_heads=3, default=True),
  dict(tokens=7, slots=200, lengths=[0, 131], heads=2, block=True),
  dict(tokens=37, slots=136, lengths=[130], block=True, window=67),
  dict(tokens=5, slots=72, lengths=[9], heads=6, kv_heads=3, sinks=True),
  dict(tokens=37, slots=328, lengths=[259], heads=2, tree=True, window=77),
  dict(
    tokens=9,
    slots=72,
    lengths=[5, 71],
    heads=4,
    kv_heads=2,
    prefix=(200, 131),
    member=[1, 0],
    tree=True,
    window=3,
    sinks=True,
  ),
)
SHORT = dict(tokens=3, slots=200, lengths=[131], heads=2)
EMPTY = dict(tokens=1, slots=200, lengths=[100])
LONG = dict(tokens=2, slots=328, lengths=[321], split_tiles=6, rising=True)
WIDE = dict(tokens=1, slots=8, lengths=[8], head_width=128)
MANY = dict(tokens=67, slots=328, lengths=[321], split_tiles=6)
BLOCK = dict(tokens=5, slots=8, lengths=[8], block=True)
TREE = dict(tokens=37, slots=8, lengths=[8], heads=2, tree=True)
WINDOW = dict(tokens=5, slots=328, lengths=[300], window=105)
BLIND = dict(tokens=67, slots=8, lengths=[8], window=3, steep=True)
BATCH = dict(tokens=1, slots=72, lengths=[70, 9])
PREFIX = dict(tokens=2, slots=8, lengths=[5, 8], prefix=(72, 70))
MEMBER = PREFIX | dict(heads=2, kv_heads=2, member=[0, 1])


def jobs(architecture, shapes):
  return [Job(CHECK, dict(architecture=architecture, **s)) for s in shapes]


@pytest.mark.parametrize("architecture", KERNELS)
def test_kernels_find_what_the_reference_finds(architecture):
  assert run(jobs(architecture, SHAPES[:2]), 60) == [SOUND] * 2


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_kernels_find_it_at_every_shape(architecture):
  verdicts = run(jobs(architecture, SHAPES[2:]), 60)
  assert verdicts == [SOUND] * len(verdicts)


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_a_row_gets_the_same_bits_in_any_company(architecture):
  assert run([Job(EXACT, dict(architecture=architecture))], 120) == [SOUND]


# --- Planted bugs -------------------------------------------------------------

SHARED = (
  (
    "rows of a block see its first keys alone",
    "splits.py",
    "jnp.where(of_block != 0, seen, exist)",
    "jnp.where(of_block != 0, seen & 3, exist)",
    BLOCK,
  ),
  (
    "one slot too many is seen",
    "splits.py",
    "_low_bits(span.num_keys - key)",
    "_low_bits(span.num_keys - key + 1)",
    SHORT,
  ),
  (
    "splits overlap",
    "splits.py",
    "split * self.config.split_slots)",
    "split * self.config.tile_slots)",
    SHORT,
  ),
  (
    "a tile that is not full is left out",
    "splits.py",
    "lax.div(keys + (tile - 1), tile)",
    "lax.div(keys, tile)",
    SHORT,
  ),
  (
    "the last tile is taken to be full",
    "splits.py",
    "lax.max(lax.div(keys, tile), 0)",
    "lax.max(lax.div(keys + (tile - 1), tile), 0)",
    SHORT,
  ),
  (
    "a window counts from the split's first slot",
    "splits.py",
    "_low_bits(slots - (span.start + key))",
    "_low_bits(slots - key)",
    WINDOW,
  ),
  (
    "a mask forgets the tiles that were left out",
    "splits.py",
    "key = (span.first_tile + tile) * self",
    "key = tile * self",
    WINDOW,
  ),
  (
    "half of the bits of a word are read",
    "splits.py",
    "columns & (WORD - 1)) & 1",
    "columns & 15) & 1",
    TREE,
  ),
  (
    "all sequences have the first one's length",
    "splits.py",
    "lax.div(head, self.heads_per_sequence)",
    "head * 0",
    BATCH,
  ),
  (
    "weights are powers of 2, not of e",
    "splits.py",
    "self.scale * math.log2(math.e)",
    "self.scale",
    SHORT,
  ),
  (
    "rows of a token lie next to each other",
    "partials.py",
    "jnp.concatenate([per_token] * repeats, axis=-1)",
    "jnp.repeat(per_token, repeats, axis=-1)",
    TREE,
  ),
  (
    "what an empty split left is counted",
    "partials.py",
    "part.total > LOWEST",
    "part.total >= LOWEST",
    EMPTY,
  ),
  (
    "parts weigh the same",
    "partials.py",
    "part.out * weights[..., None]",
    "part.out",
    SHORT,
  ),
  (
    "a sequence gets another one's prefix rows",
    "partials.py",
    "x = x.reshape(C, G, batch, rows // batch, *x.shape[3:]).swapaxes(1, 2)",
    "x = x.reshape(C, rows // batch, batch, G, *x.shape[3:]).swapaxes(1, 3)"
    ".swapaxes(1, 2)",
    PREFIX,
  ),
  (
    "who is no member has the prefix",
    "partials.py",
    "jnp.where(void[:, None], LOWEST, part.total)",
    "part.total",
    MEMBER,
  ),
  (
    "members are told by head",
    "api.py",
    "~jnp.repeat(member, G)",
    "~jnp.tile(member, G)",
    MEMBER,
  ),
)

SM90 = (
  (
    "scores before the keys have landed",
    "plgpu.barrier_wait(key_loaded.at[slot])",
    "pass",
    SHORT,
  ),
  (
    "adds before the values have landed",
    "plgpu.barrier_wait(value_loaded.at[slot])",
    "pass",
    SHORT,
  ),
  (
    "scores before the queries have landed",
    "plgpu.barrier_wait(query_loaded.at[group])",
    "pass",
    SHORT,
  ),
  (
    "a slot is filled while the other group reads it",
    "plgpu.barrier_wait(consumed.at[lax.rem(following, stages)])",
    "pass",
    MANY,
  ),
  (
    "waits for one reader of two",
    "consumed=plgpu.Barrier(num_arrivals=groups",
    "consumed=plgpu.Barrier(num_arrivals=1",
    MANY,
  ),
  (
    "a slot is never freed",
    "plgpu.barrier_arrive(consumed.at[slot])",
    "pass",
    LONG,
  ),
  (
    "the copy of weights is not waited for",
    "      plgpu.commit_smem()\n      plgpu.barrier_wait(value",
    "      plgpu.barrier_wait(value",
    SHORT,
  ),
  (
    "the total is not rescaled",
    "total = total * keep +",
    "total = total +",
    LONG,
  ),
  (
    "the sums are not rescaled",
    "attended * spread(keep, attended.shape) + added",
    "attended + added",
    LONG,
  ),
  (
    "leaves before the result is stored",
    "      plgpu.wait_smem_to_gmem(0)\n",
    "",
    SHORT,
  ),
  (
    "overwrites a result that is being stored",
    "plgpu.wait_smem_to_gmem(0, wait_read_only=True)",
    "pass",
    WIDE,
  ),
  (
    "stores before the result is written",
    "        out_s[group] = attended[:, columns]\n        plgpu.commit_smem()",
    "        out_s[group] = attended[:, columns]",
    SHORT,
  ),
  (
    "both groups take the first one's rows",
    "pl.ds(row_tile * config.rows + group * GROUP_ROWS, GROUP_ROWS)",
    "pl.ds(row_tile * config.rows, GROUP_ROWS)",
    MANY,
  ),
  (
    "a row that sees no key of a tile weighs them",
    "fill(GROUP_ROWS, FLOOR, BY_ROW)",
    "fill(GROUP_ROWS, LOWEST, BY_ROW)",
    BLIND,
  ),
)


SM100 = (
  (
    "scores before the keys have landed",
    "plgpu.barrier_wait(key_loaded.at[slot])",
    "pass",
    SHORT,
  ),
  (
    "adds before the values have landed",
    "plgpu.barrier_wait(value_loaded.at[slot])",
    "pass",
    SHORT,
  ),
  (
    "scores before the queries have landed",
    "plgpu.barrier_wait(query_loaded)",
    "pass",
    SHORT,
  ),
  (
    "overwrites keys that are being read",
    "plgpu.barrier_wait(free.at[slot])",
    "pass",
    LONG,
  ),
  (
    "overwrites scores that are being read",
    "plgpu.barrier_wait(scores_free)",
    "pass",
    LONG,
  ),
  (
    "adds before the weights are there",
    "plgpu.barrier_wait(weighed)",
    "pass",
    SHORT,
  ),
  (
    "overwrites weights that are being read",
    "      @pl.when(tile > 0)\n      def _():\n"
    "        plgpu.barrier_wait(summed)\n",
    "",
    LONG,
  ),
  (
    "stores before the last sum",
    "      plgpu.barrier_wait(summed)\n\n      def store",
    "      def store",
    SHORT,
  ),
  (
    "reads scores before they are there",
    "plgpu.barrier_wait(scored)",
    "pass",
    SHORT,
  ),
  (
    "never says that there are scores",
    "plgpu.tcgen05_commit_arrive(scored)",
    "pass",
    SHORT,
  ),
  (
    "weights are not waited for",
    "      plgpu.commit_tmem()\n",
    "",
    SHORT,
  ),
  (
    "scores are given away while they are loaded",
    "      plgpu.wait_load_tmem()\n\n      @pl.when(tile + 1",
    "      @pl.when(tile + 1",
    LONG,
  ),
  (
    "the sums are not rescaled",
    "pl.when((tile > 0) & any_grows)",
    "pl.when(tile < 0)",
    LONG,
  ),
  (
    "the total is not rescaled",
    "weigh, total * keep)",
    "weigh, total)",
    LONG,
  ),
  (
    "rescales by what was found, not by what is kept",
    "keep = jnp.exp2(top - new_top)",
    "keep = jnp.exp2(top - found)",
    LONG,
  ),
  (
    "sums begin with what was there before",
    "accumulate=tile > 0",
    "accumulate=True",
    SHORT,
  ),
  (
    "leaves before the result is stored",
    "      plgpu.wait_smem_to_gmem(0)\n",
    "",
    SHORT,
  ),
  (
    "overwrites a result that is being stored",
    "plgpu.wait_smem_to_gmem(0, wait_read_only=True)",
    "pass",
    SHORT,
  ),
  (
    "stores before the result is written",
    "        plgpu.commit_smem()\n",
    "",
    SHORT,
  ),
)


def mutants(architecture):
  """The kernel's own bugs, and half of those in code that both share."""
  own = SM90 if architecture == "sm90" else SM100
  shared = SHARED[KERNELS.index(architecture) :: len(KERNELS)]
  found = [(*bug[:1], f"kernel_{architecture}.py", *bug[1:]) for bug in own]
  return [
    Mutant(name, f"block_attention/{file}", old, new, arguments)
    for name, file, old, new, arguments in (*shared, *found)
  ]


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_planted_bugs_are_noticed(architecture):
  bugs = mutants(architecture)
  planted = [
    Job(CHECK, dict(architecture=architecture, **bug.arguments), bug)
    for bug in bugs
  ]
  verdicts = run(planted, timeout=30)
  missed = [
    bug.name
    for bug, verdict in zip(bugs, verdicts, strict=True)
    if verdict == SOUND
  ]
  assert not missed


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_without_a_bug_the_same_shapes_are_sound(architecture):
  """Else a bug might be noticed for nothing."""
  shapes = (
    *(SHORT, EMPTY, LONG, WIDE, MANY, TREE, BLOCK, WINDOW, BLIND, BATCH),
    PREFIX,
  )
  assert run(jobs(architecture, shapes), 60) == [SOUND] * len(shapes)
