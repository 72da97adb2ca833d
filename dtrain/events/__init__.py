"""Which methods know no rounds, only events at random times, and how quickly do they get anywhere? Pure: numpy, no torch."""
