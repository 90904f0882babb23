"""Games of textarena for a policy: against fixed opponents, and against itself.

    make = lambda: textarena.make("TicTacToe-v0-raw")
    rows = game_rows(make, range(1000), roles=(0, 1), opponents={0: first_free, 1: first_free})
    respond = against(make, {0: first_free, 1: first_free})

    rows, respond = game_rows(make, range(1000)), self_play(make)
    advantage = turn_advantages.from_turns(gamma=0.0, compare=turn_advantages.by_role(centered_advantages))

A game is anything with textarena's steps: `reset(num_players=, seed=)`, `get_observation() -> (player, observation)`,
`step(action) -> (done, info)` and `close() -> (rewards, info)`. Its observation is a text, or what the game has said
since the player's last one, as messages `(from, text, type)`; of a text that begins with the one before, as wrappers
give it that repeat the game so far, only the rest is said.

textarena seeds Python's own generator when a game is reset, which all games of a process share: one that draws later on
is repeated only if it is played alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from grpo_jax.data import Row
from grpo_jax.environments import Message, Respond, Turn

STATE = "_game"  # the column of a conversation's row that holds its game
Make = Callable[[], Any]
Player = Callable[[Any], str]  # an observation as the game gives it -> an action


@dataclasses.dataclass
class _Game:
    """A game that is played."""

    game: Any
    told: dict[int, str] = dataclasses.field(default_factory=dict)  # the last text that each player was given
    movers: list[int] = dataclasses.field(default_factory=list)  # who made each of the policy's turns


def game_rows(
    make: Make,
    seeds: Iterable[int],
    *,
    roles: Iterable[int] = (0,),
    opponents: Mapping[int, Player] | None = None,
    players: int = 2,
    prompt_column: str = "prompt",
) -> list[Row]:
    """A row for each seed and role, whose prompt is what the policy reads first, as chat messages.

    Args:
      make: a new game.
      seeds: of the games.
      roles: that the policy plays; for self-play, the one that begins.
      opponents: as in `against`; those who move before the policy are asked here and again when the game begins, and
        have to move the same.
      players: of a game.
      prompt_column: of the rows.

    Raises:
      ValueError: for a game that is over before the policy moves; for a role that is nobody's turn.
    """
    rows = []
    for seed in seeds:
        for role in roles:
            row: Row = {"seed": seed, "role": role}
            said = _until(_begin(make, row, players, None), role, opponents or {})
            if said is None:
                raise ValueError(f"the game of seed {seed} is over before player {role} moves")
            rows.append(row | {prompt_column: [{"role": "user", "content": said}]})
    return rows


def against(make: Make, opponents: Mapping[int, Player], *, players: int = 2, mistakes: int | None = None) -> Respond:
    """Makes the environment in which the policy plays the row's `role` and `opponents` all others.

    The reward of the last turn is the one that the game gives to that role.

    Args:
      make: a new game, of which each conversation has its own.
      opponents: by their numbers; that of the policy's own role is not asked.
      players: of a game.
      mistakes: moves in a row that are not allowed and may be made anew; as many as the game has it unless given.
    """

    def respond(row: Row, messages: list[Message]) -> Turn:
        if STATE not in row:
            row[STATE] = _begin(make, row, players, mistakes)
            _until(row[STATE], row["role"], opponents)
        held = row[STATE]
        done, _ = held.game.step(messages[-1]["content"])
        said = None if done else _until(held, row["role"], opponents)
        return Turn(None, _rewards(held)[row["role"]]) if said is None else Turn(said)

    return respond


def self_play(make: Make, *, players: int = 2) -> Respond:
    """Makes the environment in which the policy plays all roles, whose turns follow one another in one conversation.

    Each player so reads what the others did and were told: it is for games in which nothing is hidden. At the end each
    turn has as its reward that of the role which made it, not discounted and not summed: `from_turns(gamma=0.0)`,
    with `by_role` for a baseline per role (Liu et al. 2025, arXiv:2506.24119, section 3.3, whose baseline is a running
    one). A move that is not allowed loses the game, so that roles take turns.

    Args:
      make: a new game, of which each conversation has its own.
      players: of a game.
    """

    def respond(row: Row, messages: list[Message]) -> Turn:
        if STATE not in row:
            row[STATE] = _begin(make, row, players, 0)
            row[STATE].movers.append(_observe(row[STATE])[0])
        held = row[STATE]
        done, _ = held.game.step(messages[-1]["content"])
        if not done:
            mover, said, _ = _observe(held)
            held.movers.append(mover)
            return Turn(said)
        rewards = _rewards(held)
        *earlier, last = [rewards[mover] for mover in held.movers]
        return Turn(None, last, [*enumerate(earlier)])

    return respond


def _begin(make: Make, row: Row, players: int, mistakes: int | None) -> _Game:
    game = make()
    game.reset(num_players=players, seed=row["seed"])
    if mistakes is not None and hasattr(getattr(game, "state", None), "error_allowance"):
        game.state.error_allowance = mistakes  # few games take it as an argument
    return _Game(game)


def _until(held: _Game, role: int, opponents: Mapping[int, Player]) -> str | None:
    """Has the opponents move until the role's turn has come; what it reads then, None where the game is over."""
    while True:
        player, said, observation = _observe(held)
        if player == role:
            return said
        if player not in opponents:
            raise ValueError(f"it is the turn of player {player}, and there are opponents for {sorted(opponents)}")
        done, _ = held.game.step(opponents[player](observation))
        if done:
            return None


def _observe(held: _Game) -> tuple[int, str, Any]:
    """Whose turn it is, what is new to that player, and the observation as it is."""
    player, observation = held.game.get_observation()
    if isinstance(observation, str):
        said = observation.removeprefix(held.told.get(player, ""))
        held.told[player] = observation
    else:
        said = "\n".join(text for sender, text, *_ in observation if sender != player)
    return player, said.strip() or "Your turn.", observation


def _rewards(held: _Game) -> Mapping[int, float]:
    rewards, info = held.game.close()
    if rewards is None:
        raise ValueError(f"the game is over and gives no rewards: {info!r:.200}")
    return {player: float(reward) for player, reward in rewards.items()}
