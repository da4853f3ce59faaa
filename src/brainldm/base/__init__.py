"""Files written whole or not at all, named random streams, volumes with an affine. No torch here."""
