"""Speed: named cases, rival libraries, the measuring loop and the reports made from its JSON lines."""
