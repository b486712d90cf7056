"""Collectives read from HLO text: kinds, sizes, groups, loops, pieces. And from a real program."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfflax.insight.collectives import Collective, collectives

HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %psum.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-reduce(%g), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %psum.2 = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%h), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%counted (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %scatter = f32[2]{0} reduce-scatter(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

%piece.1 (p: bf16[4]) -> bf16[16] {
  %gather.1 = bf16[16]{0} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%piece.2 (p: bf16[4]) -> bf16[16] {
  %gather.2 = bf16[16]{0} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop.1 = (s32[], bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %loop.2 = (s32[], f32[2]{0}) while(%t), condition=%condition, body=%counted, backend_config={"known_trip_count":{"n":"3"}}
  %f.1 = bf16[16]{0} fusion(%x), kind=kCustom, calls=%piece.1
  %f.2 = bf16[16]{0} fusion(%x), kind=kCustom, calls=%piece.2
  %start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = f32[8]{0} collective-permute-done(%start)
  %half = bf16[6]{0} all-gather(%x), channel_id=11, replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}
  %alone = f32[100]{0} all-reduce(%x), channel_id=4, replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %both = (f32[3]{0}, /*index=1*/pred[4]{0}) all-reduce(%a, %b), channel_id=5, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_every_way_in_which_hlo_says_it():
    found = {(each.kind, each.devices): each for each in collectives(HLO, 4)}
    assert found == {
        # Twice in a loop of 5, one channel or not: 10 times 32 numbers of 2 bytes.
        ("all-reduce", 2): Collective("all-reduce", 2, 10, 10 * 64),
        # The whole array is the four parts; the loop says itself that it runs 3 times.
        ("reduce-scatter", 4): Collective("reduce-scatter", 4, 3, 3 * 4 * 8),
        # Two pieces of one; and what starts and is done counts once.
        ("all-gather", 4): Collective("all-gather", 4, 1, 32),
        # Among some of the devices, which are numbered in an order of their own.
        ("all-gather", 2): Collective("all-gather", 2, 1, 12),
        ("collective-permute", 2): Collective("collective-permute", 2, 1, 32),
        # A tuple, among all; one among single devices is none.
        ("all-reduce", 4): Collective("all-reduce", 4, 1, 16),
    }


def test_those_that_send_most_come_first():
    sent = [each.sent for each in collectives(HLO, 4)]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] == 10 * 64


def test_a_real_program_with_a_loop():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))

    def summed(rows):  # a vector of 6 over all devices, in each of 3 rounds
        return jax.lax.scan(lambda x, _: (jnp.sin(rows @ x).sum(0) * rows.sum(0), None),
                            jnp.ones((6,)), length=3)[0]  # fmt: skip

    split = NamedSharding(mesh, PartitionSpec("data"))
    rows = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split)
    hlo = jax.jit(summed).lower(rows).compile().as_text()
    assert hlo
    found = collectives(hlo, 4)
    [reduced] = [each for each in found if each.kind == "all-reduce"]
    assert reduced.devices == 4
    assert reduced.count >= 3  # one sum in each round at the least
