"""One process that takes the place of any rank of a job: its process groups, with nobody in them.

Megatron's own code decides which ranks make up which group; a group knows its ranks, and which of
them this process is at the moment (`World.rank`). Nothing can be sent: collectives are replaced by
those who know what the other ranks would have sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class Group(dist.ProcessGroup):
    """A process group of ranks of which at most one is there."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        super().__init__(0, len(ranks))
        self._world, self.ranks = world, list(ranks)
        self._index = {rank: index for index, rank in enumerate(ranks)}

    def rank(self) -> int:
        """Where the rank that this process is at the moment stands in the group.

        A group of the rank that built the model, which this one is not in: it has one of its own
        that looks the same, in which it stands where that one does.
        """
        here = self._world.rank if self._world.rank in self._index else self._world.builder
        return self._index[here]

    def size(self) -> int:
        return len(self.ranks)


class World:
    """The ranks of a job, as `torch.distributed` of this process shows them. One at a time."""

    def __init__(self, size: int) -> None:
        self.rank = self.builder = 0
        state: Any = distributed_c10d._world
        for groups in (state.pg_map, state.pg_names, state.pg_group_ranks):
            groups.clear()  # those of the world before
        self._everyone = self._group(range(size))
        distributed_c10d._update_default_pg(self._everyone)
        replaced: Any = dist
        replaced.new_group = self._new_group
        replaced.all_gather_object = self._all_gather_object
        for name in ("all_reduce", "broadcast", "barrier", "destroy_process_group"):
            setattr(dist, name, lambda *args, **kwargs: None)

    def become(self, rank: int) -> None:
        """Be another rank, also when Megatron builds its groups next."""
        self.rank = self.builder = rank

    def _group(self, ranks: Sequence[int]) -> Group:
        group = Group(self, ranks)
        state: Any = distributed_c10d._world
        state.pg_group_ranks[group] = dict(group._index)
        state.pg_map[group] = ("fake", None)
        state.pg_names[group] = str(id(group))
        return group

    def _new_group(self, ranks: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if ranks is None:
            return self._everyone
        return self._group(ranks) if self.rank in ranks else dist.GroupMember.NON_GROUP_MEMBER

    @staticmethod
    def _all_gather_object(everyone: list, mine: Any, group: Any = None) -> None:
        # Asked of all ranks are the names of parameter groups, which differ between pipeline
        # stages only by groups that are empty there.
        everyone[:] = [mine] * len(everyone)
