"""How do bytes move between islands? One file a way; ``base.py`` says what each must do."""
