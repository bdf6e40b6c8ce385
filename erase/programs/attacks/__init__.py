"""What `erase attack` does with each attack of `erase.attacks`: one file a group; `kinds` lists them."""
