"""Print `varlik/models/imagenet_classes.txt` from its two sources.

    python examples/imagenet_class_names.py imagenet_synsets.txt data.noun > varlik/models/imagenet_classes.txt

`imagenet_synsets.txt` lists the 1000 synset ids of ILSVRC-2012, one a line; the timm wheel has it as
`timm/data/_info/imagenet_synsets.txt` (`pip download --no-deps timm`). `data.noun` is the noun database of WordNet 3.0,
for instance `/usr/share/wordnet/data.noun` of the Debian package `wordnet-base`: a synset id is "n" and the synset's
offset in it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

HEADER = """\
# The 1000 classes of ILSVRC-2012 (ImageNet-1k) in the order of their labels, which is that of the sorted synset ids.
# A line is a synset id, then the class name: the first lemma of the synset, with further lemmas where several classes
# begin with the same one, and the synset id in brackets where all lemmas agree. Names differ even when case is ignored.
# Made by examples/imagenet_class_names.py.
#
# Names: WordNet 3.0 (https://wordnet.princeton.edu), under the WordNet 3.0 licence:
#
# This software and database is being provided to you, the LICENSEE, by Princeton University under the following
# license. By obtaining, using and/or copying this software and database, you agree that you have read, understood,
# and will comply with these terms and conditions.:
#
# Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
# without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
# statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
# documentation, including modifications that you make for internal use or for distribution.
#
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.
#
# THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES,
# EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR
# WARRANTIES OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE,
# DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.
#
# The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution
# of the software and/or database. Title to copyright in this software, database and any associated documentation
# shall at all times remain with Princeton University and LICENSEE agrees to preserve same.
"""


def read_lemmas(data_noun: Path, synsets: list[str]) -> dict[str, list[str]]:
    """Lemmas of every synset, in WordNet's order.

    A line of the database is `offset file type count lemma lex_id lemma lex_id ...`, with a hexadecimal count.
    """
    wanted = {synset[1:]: synset for synset in synsets}
    lemmas = {}
    for line in data_noun.read_text(encoding="ascii").splitlines():
        fields = line.split(" ")
        if fields[0] in wanted:
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            lemmas[wanted[fields[0]]] = [word.replace("_", " ") for word in words]
    return lemmas


def unique_names(lemmas: dict[str, list[str]]) -> dict[str, str]:
    """A name for every synset: as few lemmas as set it apart from the others, case aside."""
    taken = dict.fromkeys(lemmas, 1)
    while True:
        names = {synset: ", ".join(words[: taken[synset]]) for synset, words in lemmas.items()}
        count = Counter(name.lower() for name in names.values())
        repeated = [synset for synset, name in names.items() if count[name.lower()] > 1]
        growing = [synset for synset in repeated if taken[synset] < len(lemmas[synset])]
        if not growing:
            return names | {synset: f"{names[synset]} ({synset})" for synset in repeated}
        for synset in growing:
            taken[synset] += 1


def main(synset_list: str, data_noun: str) -> None:
    synsets = Path(synset_list).read_text(encoding="ascii").split()
    if len(synsets) != 1000 or synsets != sorted(set(synsets)):
        raise SystemExit(f"{synset_list}: expected 1000 sorted synset ids")
    lemmas = read_lemmas(Path(data_noun), synsets)
    if absent := [synset for synset in synsets if synset not in lemmas]:
        raise SystemExit(f"{data_noun} lacks {', '.join(absent)}: is it that of WordNet 3.0?")
    names = unique_names(lemmas)
    print(HEADER, end="")
    for synset in synsets:
        print(synset, names[synset])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
