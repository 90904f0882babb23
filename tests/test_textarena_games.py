"""Games with textarena's steps: what the policy reads, and what each of its turns is rewarded with."""

import pytest

from grpo_jax.environments import Turn
from grpo_jax.textarena_games import against, game_rows, self_play


class Nim:
    """As textarena's games: who takes the last of some sticks wins; a move that is not allowed loses."""

    def __init__(self, repeats=False):
        self.repeats = repeats  # as its wrappers do, the game so far

    def reset(self, num_players, seed=None):
        self.left, self.player, self.done = 3 + seed, 0, False
        self.said = {player: [(-1, f"You are player {player}. Take 1 or 2.", 0)] for player in range(num_players)}
        self.history = dict.fromkeys(range(num_players), "")
        self.tell(f"{self.left} sticks.")

    def tell(self, text, sender=-1):
        for said in self.said.values():
            said.append((sender, text, 0))

    def get_observation(self):
        new, self.said[self.player] = self.said[self.player], []
        if not self.repeats:
            return self.player, new
        self.history[self.player] += "".join(f"{text}\n" for sender, text, _ in new if sender != self.player)
        return self.player, self.history[self.player]

    def step(self, action):
        self.tell(f"player {self.player} takes {action}", self.player)
        allowed = action in ("1", "2") and int(action) <= self.left
        self.left -= int(action) if allowed else 0
        self.done = not allowed or self.left == 0
        self.winner = self.player if allowed else 1 - self.player
        self.player = 1 - self.player
        self.tell(f"{self.left} sticks.")
        return self.done, {}

    def close(self):
        return {self.winner: 1, 1 - self.winner: -1}, {}


def takes_one(observation):
    assert "sticks" in str(observation)
    return "1"


def play(respond, row, *said):
    row, turns = dict(row), []
    messages = [*row["prompt"]]
    for text in said:
        messages.append({"role": "assistant", "content": text})
        turns.append(respond(row, messages))
        messages += [{"role": "user", "content": turns[-1].content}]
    return turns


@pytest.mark.parametrize("repeats", [False, True], ids=["messages", "a text that repeats the game"])
def test_the_policy_plays_its_role_against_opponents_that_stay(repeats):
    def make():
        return Nim(repeats)

    opponents = {0: takes_one, 1: takes_one}
    first, second = game_rows(make, [0], roles=(0, 1), opponents=opponents)
    assert first["prompt"] == [{"role": "user", "content": "You are player 0. Take 1 or 2.\n3 sticks."}]
    assert second["prompt"][0]["content"] == ("You are player 1. Take 1 or 2.\n3 sticks.\nplayer 0 takes 1\n2 sticks.")
    respond = against(make, opponents)
    won, lost = play(respond, first, "1", "1"), play(respond, first, "2")
    assert won == [Turn("2 sticks.\nplayer 1 takes 1\n1 sticks."), Turn(None, 1.0)]
    assert lost == [Turn(None, -1.0)]  # by the opponent's last move
    assert play(respond, second, "2") == [Turn(None, 1.0)]
    assert play(respond, second, "two") == [Turn(None, -1.0)]
    with pytest.raises(ValueError, match=r"it is the turn of player 1, and there are opponents for \[0\]"):
        play(against(make, {0: takes_one}), first, "1")


def test_in_self_play_each_turn_has_the_reward_of_the_role_that_made_it():
    (row,) = game_rows(Nim, [1])
    turns = play(self_play(Nim), row, "1", "1", "2")
    assert [turn.content for turn in turns] == [
        "You are player 1. Take 1 or 2.\n4 sticks.\nplayer 0 takes 1\n3 sticks.",
        "3 sticks.\nplayer 1 takes 1\n2 sticks.",
        None,
    ]
    assert turns[-1] == Turn(None, 1.0, [(0, 1.0), (1, -1.0)])


def test_a_game_that_is_over_before_the_policy_moves_is_refused():
    with pytest.raises(ValueError, match="the game of seed 1 is over before player 1 moves"):
        game_rows(Nim, [1], roles=[1], opponents={0: lambda observation: "all of them"})


def test_a_game_of_textarena():
    textarena = pytest.importorskip("textarena")

    def make():
        return textarena.make("TicTacToe-v0-raw")

    def first_free(observation):
        board = next(text for _, text, *_ in reversed(observation) if "[" in text)
        return next(f"[{n}]" for n in range(9) if f"[{n}]" in board)

    (row,) = game_rows(make, [0])
    assert "Player 0" in row["prompt"][0]["content"]
    turns = play(against(make, {1: first_free}), row, "[4]", "[6]", "[2]")
    assert turns[-1] == Turn(None, 1.0)
    assert play(against(make, {1: first_free}, mistakes=0), row, "[9]") == [Turn(None, -1.0)]
    assert "invalid move" in play(against(make, {1: first_free}), row, "[9]")[0].content
    assert play(self_play(make), row, "[4]", "[4]")[-1] == Turn(None, -1.0, [(0, 1.0)])
