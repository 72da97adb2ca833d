"""Does each part do what it says, alone and in one process?"""
